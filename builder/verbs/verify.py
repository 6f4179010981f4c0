"""The verb `verify`: the proof of every hybrid shard of a pipeline."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.hybrid.verify.proof import Proof
from builder.hybrid.verify.prover import Prover
from builder.progress import Talk
from builder.verbs.pipeline import Pipeline, hybrid_shards_of
from builder.verbs.write import plans_of


def prove(pipeline: Pipeline, talk: Talk) -> Proof:
    """Proves every hybrid shard of the pipeline; changes nothing on disk."""
    layout = pipeline.layout
    shards = hybrid_shards_of(pipeline)
    prover = Prover(layout, shards, pipeline.editing)
    prover.check_gone(pipeline.asked.find().gone(layout.shard_names()))
    refused: dict[str, BuilderError] = {}
    with talk.bar("verify", len(shards), "shards") as bar:
        readable = prover.readable()
        for plan in plans_of(pipeline, readable, refused):
            prover.prove(plan)
            bar.update(prover.looked_at, len(prover.wrong))
    for shard, error in refused.items():
        prover.refuse(shard, error)
    return prover.finish(layout.shard_names())
