"""The verb `ingest`: new and changed shards go into the table."""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.engine import outdated, runs
from builder.engine.runs import Outcome
from builder.hybrid import writer
from builder.progress import Talk
from builder.sources.tars import shards as tar_shards
from builder.store import files
from builder.table import root_schema, schema
from builder.table.query import Samples
from builder.verbs.pipeline import EXAMPLES, Pipeline, few

# --- ingest ---


@dataclass
class IngestPlan:
    """What ingest would do.

    Attributes:
        todo: shards that are new, changed on disk, or read with other fields.
        missing: files that the pattern names and that do not exist.
        vanished: shards of the table that the pipeline names no more.
        changed: of todo, shards that are not as they were on disk: their members are read, too.
        versions: how many shards of the table each version of ingest has read.
    """

    found: tar_shards.Found
    todo: list[Path]
    missing: list[Path]
    vanished: list[str]
    changed: list[str]
    versions: Counter[str]


def plan_ingest(pipeline: Pipeline, *, redo: bool = False) -> IngestPlan:
    """Compares the shards on disk with the table."""
    found = tar_shards.find(pipeline.config.patterns)
    layout, reading = pipeline.layout, pipeline.reading
    writer.check_apart(layout, list(found.paths.values()))
    todo: list[Path] = []
    changed: list[str] = []
    versions: Counter[str] = Counter()
    for shard, path in found.paths.items():
        before = tar_shards.ingested(layout, path)
        if before is None:
            todo.append(path)
            continue
        versions[before.version] += 1
        now = tar_shards.identify(path, reading)
        if redo or before != now:
            todo.append(path)
            if not tar_shards.is_same_on_disk(before, now):
                changed.append(shard)
    return IngestPlan(found, todo, found.missing, tar_shards.vanished(layout, found), changed, versions)


def run_ingest(pipeline: Pipeline, talk: Talk, *, redo: bool = False) -> Outcome:
    """Reads new and changed shards into the table."""
    pipeline.layout.check_folders()
    plan = plan_ingest(pipeline, redo=redo)
    _tell_missing(plan, talk)
    layout = pipeline.layout
    if not plan.todo:
        talk.say(f"ingest: nothing to do ({len(plan.found.paths)} shards)")
        return Outcome()
    files.check_links(layout.root)
    root_schema.extend_schema(layout, pipeline.reading.columns)
    settings = pipeline.config.run
    run = runs.new_run(layout, "ingest")
    runs.describe(
        run, "ingest", reading=pipeline.reading.to_json(), pipeline=pipeline.config.path, set=pipeline.config.sets
    )
    dealt = tar_shards.deal(plan.todo, settings.workers)
    runs.tasks_of(run, dealt)
    outcome = runs.execute(run, len(dealt), settings, talk, "ingest", len(plan.todo), "shards")
    if outcome["rows"]:
        _tell_unseen(pipeline.asked, outcome, talk)
    _tell_sizes_only(pipeline, plan.changed, talk)
    return outcome


def _tell_unseen(asked: tar_shards.Reading, outcome: Outcome, talk: Talk) -> None:
    """Says which json fields the pipeline names and no sample that was read has: a name may be misspelt."""
    names = [*asked.fields, *([asked.boxes] if asked.boxes != tar_shards.BOXES else [])]
    unseen = [name for name in names if name not in outcome.wanted]
    if unseen and not outcome.others:
        talk.say(f"ingest: no sample that was read has a json field, so these are null: {few(unseen)}")
        return
    others = sorted(outcome.others - set(names))
    for name in unseen:
        alike = [other for other in others if schema.folded(other) == schema.folded(name)]
        near = alike or difflib.get_close_matches(name, others, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"fields that there are: {few(others)}"
        talk.say(f"ingest: no sample that was read has the json field '{name}', which the pipeline names: {hint}")


def _tell_sizes_only(pipeline: Pipeline, changed: Sequence[str], talk: Talk) -> None:
    """Says of which answers nobody can tell whether their pictures are still the same bytes."""
    uses = [use for use in pipeline.stages.values() if outdated.source_members(use.stage)]
    if not changed or not uses:
        return
    with Samples(pipeline.layout, pipeline.columns(), changed) as samples:
        for name in (use.stage.name for use in uses):
            condition = f"{name}_digest is null and source_digests is not null"
            [(count,)] = samples.fixed(f"select count(*) from samples where {name}_status is not null and {condition}")
            if count:
                again = pipeline.command(f"stage {name} --redo --where {shlex.quote(condition)}")
                talk.say(
                    f"{name}: {count} answers of samples in changed shards are from a version that recorded no digest "
                    f"of what it read: only sizes were compared. To be sure: {again}"
                )


def _tell_missing(plan: IngestPlan, talk: Talk) -> None:
    if plan.missing:
        first = [f"{path} ({tar_shards.why_missing(path)})" for path in plan.missing[:EXAMPLES]]
        told = few([*first, *plan.missing[EXAMPLES:]])
        talk.say(f"{len(plan.missing)} of the shards that dataset.shards names are no files: {told}")
    if plan.vanished:
        talk.say(
            f"{len(plan.vanished)} shards of the table are gone from dataset.shards, their rows stay and are not "
            f"written: {few(plan.vanished)}"
        )
