"""The verb `fold`: partitions that are behind their column files are brought up to date."""

from __future__ import annotations

from builder.progress import Talk
from builder.store.layout import Layout
from builder.table import partitions, root_schema
from builder.verbs.pipeline import Pipeline


def fold_all(pipeline: Pipeline, talk: Talk) -> int:
    """Folds every partition that is behind its column files or the root's columns; returns how many were."""
    layout = pipeline.layout
    layout.check_folders()
    generation, _ = root_schema.load_schema(layout)
    shards = layout.shard_names()
    folded = 0
    with talk.bar("fold", len(shards), "shards") as bar:
        for done, shard in enumerate(shards, 1):
            state = partitions.partition_state(layout, shard)
            if state is None or state.schema_generation != generation or partitions.is_behind(layout, shard):
                partitions.fold(layout, shard)
                folded += 1
            bar.update(done)
    return folded


def behind(layout: Layout) -> int:
    """How many partitions are behind their column files."""
    return sum(partitions.is_behind(layout, shard) for shard in layout.shard_names())
