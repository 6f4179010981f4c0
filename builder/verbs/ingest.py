"""The verb `ingest`: new and changed shards go into the table."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.engine import outdated, runs
from builder.engine.runs import Outcome, PlannedRun
from builder.hybrid import output_folder
from builder.progress import EXAMPLES, Talk, few
from builder.sources.base import Found, Seen
from builder.sources.ingest import is_same_on_disk
from builder.store import files
from builder.store.layout import shard_name_fault
from builder.table.query import Samples
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot


@dataclass
class IngestPlan:
    """What ingest would do.

    Attributes:
        todo: shards that are new, changed on disk, or read with other fields.
        missing: files that the pattern names and that do not exist.
        vanished: shards of the table that the pipeline does not name any more.
        changed: those shards of `todo` that have changed on disk: their members are read, too.
        versions: how many shards of the table were read by each version of ingest.
    """

    found: Found
    todo: list[str]
    missing: list[Path]
    vanished: list[str]
    changed: list[str]
    versions: Counter[str]


def plan_ingest(snapshot: Snapshot, *, redo: bool = False) -> IngestPlan:
    """Compares the shards on disk with the table."""
    layout, source, found = snapshot.layout, snapshot.source, snapshot.found
    output_folder.check_apart(layout, list(found.paths.values()))
    todo: list[str] = []
    changed: list[str] = []
    versions: Counter[str] = Counter()
    for shard, path in found.paths.items():
        state = None if shard_name_fault(shard, path) else snapshot.state(shard)
        before = None if state is None else state.source
        if before is None:
            todo.append(shard)
            continue
        versions[before.version] += 1
        now = source.identify(path)
        if redo or before != now:
            todo.append(shard)
            if not is_same_on_disk(before, now):
                changed.append(shard)
    return IngestPlan(found, todo, found.missing, found.gone(snapshot.table_shards), changed, versions)


@dataclass(frozen=True)
class PlannedIngest(PlannedRun):
    """A planned ingest.

    Attributes:
        changed: as `IngestPlan` has them.
    """

    changed: Sequence[str]


def run_ingest(pipeline: Pipeline, talk: Talk, *, redo: bool = False, snapshot: Snapshot | None = None) -> Outcome:
    """Reads new and changed shards into the table."""
    snapshot = snapshot or Snapshot(pipeline)
    planned = plan_ingest_run(snapshot, talk, redo=redo)
    if planned is None:
        return Outcome()
    outcome = snapshot.execute(planned, talk)
    finish_ingest_run(snapshot, planned, outcome, talk)
    return outcome


def plan_ingest_run(snapshot: Snapshot, talk: Talk, *, redo: bool = False) -> PlannedIngest | None:
    """Writes the run of an ingest and its tasks; returns None if there is nothing to do."""
    pipeline, layout, config = snapshot.pipeline, snapshot.layout, snapshot.pipeline.config
    layout.check_folders()
    plan = plan_ingest(snapshot, redo=redo)
    _say_missing(pipeline, plan, talk)
    if not plan.todo:
        talk.say(f"ingest: nothing to do ({len(plan.found.paths)} shards)")
        return None
    files.check_links(layout.root)
    snapshot.add_columns(snapshot.source.columns)
    run = runs.describe_new(
        layout,
        "ingest",
        "ingest",
        config.run.executor,
        source={"kind": pipeline.asked.kind, **snapshot.source.to_json()},
        pipeline=config.path,
        set=config.sets,
    )
    dealt = runs.deal(plan.todo, config.run.workers)
    paths = {shard: str(path.absolute()) for shard, path in plan.found.paths.items()}
    runs.write_tasks(run, [{"paths": {shard: paths[shard] for shard in task}} for task in dealt])
    return PlannedIngest(
        run, config.run, tasks=len(dealt), label="ingest", total=len(plan.todo), unit="shards", changed=plan.changed
    )


def finish_ingest_run(snapshot: Snapshot, planned: PlannedIngest, outcome: Outcome, talk: Talk) -> None:
    """Reports the source's remarks on what was read, and answers that may be of other bytes than it has now."""
    if outcome["rows"]:
        for notice in snapshot.pipeline.asked.notices(Seen(outcome.wanted, outcome.others)):
            talk.say(f"ingest: {notice}")
    _say_sizes_only(snapshot, planned.changed, talk)


def _say_sizes_only(snapshot: Snapshot, changed: Sequence[str], talk: Talk) -> None:
    """Reports answers whose pictures may no longer be the same bytes."""
    pipeline = snapshot.pipeline
    uses = [use for use in pipeline.stages.values() if outdated.source_members(use.stage)]
    if not changed or not uses:
        return
    with Samples(pipeline.layout, snapshot.columns, changed) as samples:
        for name in (use.stage.name for use in uses):
            condition = f"{name}_digest is null and source_digests is not null"
            [(count,)] = samples.fixed(f"select count(*) from samples where {name}_status is not null and {condition}")
            if count:
                again = pipeline.command(f"stage {name} --redo --where {shlex.quote(condition)}")
                talk.say(
                    f"{name}: {count} answers of samples in changed shards are from a version that recorded no digest "
                    f"of what it read: only sizes were compared. To be sure: {again}"
                )


def _say_missing(pipeline: Pipeline, plan: IngestPlan, talk: Talk) -> None:
    setting = pipeline.asked.setting
    if plan.missing:
        first = [f"{path} ({pipeline.asked.why_missing(path)})" for path in plan.missing[:EXAMPLES]]
        names = few([*first, *plan.missing[EXAMPLES:]])
        talk.say(f"{len(plan.missing)} of the shards that {setting} names are not files: {names}")
    if plan.vanished:
        talk.say(
            f"{len(plan.vanished)} shards of the table are gone from {setting}, their rows stay and are not written: "
            f"{few(plan.vanished)}"
        )
