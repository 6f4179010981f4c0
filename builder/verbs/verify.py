"""The verb `verify`: the proof of every hybrid shard of a pipeline."""

from __future__ import annotations

from builder.engine import workset
from builder.errors import BuilderError
from builder.hybrid import verify
from builder.progress import Talk
from builder.sources.tars import shards as tar_shards
from builder.verbs.pipeline import Pipeline
from builder.verbs.write import plans_of

# --- verify, gc, fold, drop ---


def prove(pipeline: Pipeline, talk: Talk) -> verify.Proof:
    """Proves every hybrid shard of the pipeline; changes nothing on disk."""
    layout = pipeline.layout
    on_disk = tar_shards.find(pipeline.config.patterns)
    shards = workset.narrow_to(list(on_disk.paths), layout.shard_names())
    prover = verify.Prover(layout, shards, pipeline.editing)
    prover.check_gone(tar_shards.vanished(layout, on_disk))
    refused: dict[str, BuilderError] = {}
    with talk.bar("verify", len(shards), "shards") as bar:
        readable = prover.readable()
        for plan in plans_of(pipeline, readable, refused):
            prover.prove(plan)
            bar.update(prover.looked_at, len(prover.wrong))
    for shard, error in refused.items():
        prover.refuse(shard, error)
    return prover.finish(layout.shard_names())
