"""The verb `verify`: the proof of every hybrid shard of a pipeline."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.hybrid.verify.proof import Proof
from builder.hybrid.verify.prover import Prover
from builder.progress import Talk
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot
from builder.verbs.write import plans_of


def prove(pipeline: Pipeline, talk: Talk) -> Proof:
    """Proves every hybrid shard of the pipeline; changes nothing on disk."""
    snapshot = Snapshot(pipeline)
    shards = snapshot.hybrid_shards
    prover = Prover(snapshot.layout, shards, pipeline.editing)
    prover.check_gone(snapshot.found.gone(snapshot.table_shards))
    refused: dict[str, BuilderError] = {}
    with talk.bar("verify", len(shards), "shards") as bar:
        readable = prover.readable()
        for plan in plans_of(snapshot, readable, refused):
            prover.prove(plan)
            bar.update(prover.looked_at, len(prover.wrong))
    for shard, error in refused.items():
        prover.refuse(shard, error)
    return prover.finish(snapshot.table_shards)
