"""The verb `write`: hybrid shards that are not up to date."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from builder.engine import runs, workset
from builder.engine.runs import Outcome, PlannedRun
from builder.engine.workset import Slice
from builder.errors import BuilderError, TransientError
from builder.hybrid import image, output_folder, shard_plan
from builder.hybrid.edit import NO_TEXT, REASONS, SEVERAL_PICTURES
from builder.progress import Talk
from builder.store import files
from builder.store.layout import Layout
from builder.table.sql_text import read_sql
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot


@dataclass
class WritePlan:
    """What write would do.

    Attributes:
        todo: shards that are not up to date, with their rows of the write SQL.
        edited: samples that will differ, over all shards; dropped ones apart.
        stale: edited samples whose image is older than their prompt: they keep the caption it was made from.
        refused: samples that the SQL returns and that are never edited, since their source is bad.
        kept: samples that the SQL returns and that stay the source's, by reason (`hybrid.edit.REASONS`).
        needed: bytes that writing takes.
    """

    shards: int = 0
    todo: list[Slice] = field(default_factory=list)
    edited: int = 0
    dropped: int = 0
    stale: int = 0
    refused: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    needed: int = 0
    free: int = 0
    bytes: int = 0


def plan_write(snapshot: Snapshot, *, freeze: Path | None = None) -> WritePlan:
    """Evaluates the write SQL once and compares every shard with its manifest.

    Args:
        freeze: where the write rows of shards that are not up to date are kept.
    """
    layout = snapshot.layout
    shards = snapshot.hybrid_shards
    if shards:
        snapshot.heal()
    plan = WritePlan(free=output_folder.free_bytes(layout))
    largest = position = 0
    sink: pq.ParquetWriter | None = None
    try:
        for shard in write_plans(snapshot, shards):
            plan.shards += 1
            plan.stale += shard.stale
            plan.refused += shard.refused
            plan.kept += shard.kept
            plan.dropped += sum(edit.dropped for edit in shard.edits.values())
            plan.edited += sum(not edit.dropped for edit in shard.edits.values())
            if output_folder.is_written(layout, shard):
                continue
            size, more = output_folder.sizes_of(layout, shard)
            plan.needed, largest, plan.bytes = plan.needed + more, max(largest, size), plan.bytes + size
            plan.todo.append(Slice(shard.shard, position, len(shard.selected), shard.rows))
            position += len(shard.selected)
            if freeze is not None and shard.selected:
                rows = pa.Table.from_pylist(shard.selected, schema=shard.row_schema)
                sink = sink or pq.ParquetWriter(freeze, rows.schema, compression="zstd", compression_level=1)
                sink.write_table(rows)
    finally:
        if sink is not None:
            sink.close()
    plan.needed = max(plan.needed, 0) + largest
    return plan


def write_plans(snapshot: Snapshot, shards: Sequence[str]) -> Iterator[shard_plan.ShardPlan]:
    """The plan of every hybrid shard, in order."""
    return plans_of(snapshot, shards, None)


def plans_of(
    snapshot: Snapshot, shards: Sequence[str], refused: dict[str, BuilderError] | None
) -> Iterator[shard_plan.ShardPlan]:
    pipeline, write = snapshot.pipeline, snapshot.pipeline.config.write
    columns, sql = snapshot.known_columns, read_sql(write.select)
    return shard_plan.plans(
        pipeline.layout, columns, shards, sql, write.params, pipeline.editing, refused, snapshot.state
    )


def run_write(pipeline: Pipeline, talk: Talk, *, snapshot: Snapshot | None = None) -> Outcome:
    """Writes the hybrid shards that are not up to date.

    Raises:
        TransientError: too little free disk.
    """
    snapshot = snapshot or Snapshot(pipeline)
    planned = plan_write_run(snapshot, talk)
    outcome = Outcome() if planned is None else snapshot.execute(planned, talk)
    finish_write_run(pipeline, outcome, talk)
    return outcome


def plan_write_run(snapshot: Snapshot, talk: Talk) -> PlannedRun | None:
    """Freezes the rows of the write SQL and writes a run and its tasks; returns None if there is nothing to write.

    Raises:
        TransientError: too little free disk.
    """
    pipeline, layout, config = snapshot.pipeline, snapshot.layout, snapshot.pipeline.config
    if not pipeline.asked.has_hybrid_shards:
        talk.say(f"write: nothing to do (sources of the kind '{pipeline.asked.kind}' have no hybrid shards)")
        return None
    layout.check_folders()
    output_folder.check_apart(layout, list(snapshot.found.paths.values()))
    snapshot.some_shards()
    with workset.unnamed(layout) as frozen:
        with files.naming(layout.runs):
            plan = plan_write(snapshot, freeze=frozen)
        _say_kept(snapshot, plan, talk)
        if not plan.todo:
            talk.say(f"write: nothing to do ({plan.shards} hybrid shards up to date)")
            return None
        check_disk(plan, layout)
        run = runs.describe_new(
            layout,
            "write",
            "write",
            config.run.executor,
            sql=read_sql(config.write.select).origin,
            image_stage=image.image_stage(snapshot.known_columns),
            editing=asdict(pipeline.editing),
            folder=None if layout.output is None else str(layout.output.absolute()),
            pipeline=config.path,
            set=config.sets,
        )
        if frozen.exists():
            files.write_atomic(run.workset, frozen.replace)
    dealt = runs.deal(plan.todo, config.run.workers)
    runs.write_tasks(run, [workset.task_of(task) for task in dealt])
    return PlannedRun(run, config.run, tasks=len(dealt), label="write", total=len(plan.todo), unit="shards")


def finish_write_run(pipeline: Pipeline, outcome: Outcome, talk: Talk) -> None:
    """Writes `sizes.json`, and reports sources that were cut."""
    if not pipeline.asked.has_hybrid_shards:
        return
    output_folder.write_sizes(pipeline.layout)
    if cut := outcome["no_end_mark"]:
        talk.say(
            f"write: the sources of {cut} shards have no end mark, so they were cut; the hybrid shards are closed, and "
            "their _stats.json says source_end_mark: false"
        )


def _say_kept(snapshot: Snapshot, plan: WritePlan, talk: Talk) -> None:
    """Reports samples whose caption is older than their prompt, and samples that stay the source's."""
    if plan.stale:
        talk.say(
            f"write: {plan.stale} images are older than their prompts: those samples keep the caption they were "
            f"made from (draw them again: {_draw_again(snapshot)})"
        )
    for reason, count in plan.kept.items():
        talk.say(f"write: {count} {REASONS[reason]} stay the source's ({help_for(snapshot, reason)})")


def help_for(snapshot: Snapshot, reason: str) -> str:
    """What to do about samples that stay the source's, for a reason out of `hybrid.edit.REASONS`."""
    if reason == SEVERAL_PICTURES:
        return 'say what becomes of the others: [write] other_pictures = "keep" or "drop"'
    if reason == NO_TEXT:
        return "give them a json: [write] json = true"
    return f'make them in that format: {_draw_again(snapshot)}, or take jpg: [write] image = "jpg"'


def _draw_again(snapshot: Snapshot) -> str:
    """The command that makes new images where the inputs of the old ones have changed."""
    stage = image.image_stage(snapshot.known_columns) or "STAGE"
    return snapshot.pipeline.command(f"stage {stage} --stale")


def check_disk(plan: WritePlan, layout: Layout) -> None:
    """Raises TransientError if the output does not fit on the disk."""
    if plan.needed > plan.free:
        raise TransientError(
            f"too little free disk for write: {plan.needed:,} bytes needed, {plan.free:,} free",
            where={"folder": layout.shards, "shards to write": len(plan.todo)},
            fix="free some space, or name a folder on another disk: [write] folder in the pipeline",
        )
