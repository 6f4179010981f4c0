"""The verb `stage`: one stage over its work set."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder.engine import runs, workset
from builder.engine.counting import count_rows
from builder.engine.runs import Outcome, PlannedRun
from builder.engine.work import Choice, Counts, Work
from builder.errors import LASTING
from builder.progress import Talk
from builder.stages.contract import columns_of
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table.query import Samples
from builder.verbs.pipeline import Pipeline, StageUse, use_of
from builder.verbs.snapshot import Snapshot
from builder.verbs.works import work_of


@dataclass(frozen=True)
class PlannedStage(PlannedRun):
    """A planned run of a stage.

    Attributes:
        work: what its work set was made from.
    """

    work: Work


def run_stage(
    pipeline: Pipeline, name: str, choice: Choice, talk: Talk, *, snapshot: Snapshot | None = None
) -> Outcome:
    """Runs one stage over its work set.

    Raises:
        BuilderError: bad SQL, a stage that cannot start, a task that did not finish.
    """
    snapshot = snapshot or Snapshot(pipeline)
    planned = plan_stage_run(snapshot, name, choice, talk)
    if planned is None:
        return Outcome()
    outcome = snapshot.execute(planned, talk)
    finish_stage_run(snapshot, planned, outcome, talk)
    return outcome


def plan_stage_run(snapshot: Snapshot, name: str, choice: Choice, talk: Talk) -> PlannedStage | None:
    """Freezes a stage's work set and writes its run and its tasks; returns None if there is nothing to do.

    Raises:
        BuilderError: bad SQL.
    """
    pipeline, layout, use = snapshot.pipeline, snapshot.layout, use_of(snapshot.pipeline, name)
    layout.check_folders()
    work = work_of(snapshot, name, choice, snapshot.some_shards())
    snapshot.add_columns(columns_of(use.stage))
    snapshot.heal()
    with workset.unnamed(layout) as frozen:
        with files.naming(layout.runs):
            slices = workset.freeze(layout, frozen, work)
        if not slices:
            [counts] = count_rows(layout, [work])
            if choice.retry and counts.failed:
                _say_classes(layout, work, talk)
            nothing_to_do(name, counts, talk)
            return None
        if use.stage.notice:
            talk.say(f"{name}: {use.stage.notice}")
        if again := sum(part.again for part in slices):
            talk.say(f"{name}: {again} rows are answered again: their inputs have changed since")
        run = _describe(pipeline, use, work)
        files.write_atomic(run.workset, frozen.replace)
    dealt = workset.cut(slices, use.run.workers)
    runs.write_tasks(run, [workset.task_of(task) for task in dealt])
    rows = sum(part.count for part in slices)
    return PlannedStage(run, use.run, tasks=len(dealt), label=name, total=rows, unit="rows", work=work)


def finish_stage_run(snapshot: Snapshot, planned: PlannedStage, outcome: Outcome, talk: Talk) -> None:
    """Reports what the stage has counted itself, and how many of its answers have a note."""
    work = planned.work
    for line in work.stage.summary(outcome.totals):
        talk.say(f"{planned.label}: {line}")
    if work.stage.noting:
        _say_notes(snapshot.pipeline, work, work.stage.noting, planned.files.name, talk)


def _say_notes(pipeline: Pipeline, work: Work, column: str, run: str, talk: Talk) -> None:
    """Reports how many rows of a run have a note: part of their input was changed or ignored."""
    with Samples(pipeline.layout, work.columns, work.shards) as samples:
        of_run = f"{column} is not null and {work.stage.name}_run = '{run}'"
        [(rows, example)] = samples.fixed(f"select count(*), min({column}) from samples where {of_run}")
    if rows:
        question = f"select shard, row, {column} from samples where {column} is not null"
        listed = pipeline.command(f"sql {shlex.quote(question)}")
        talk.say(f'{work.stage.name}: {rows} rows have {column}, for example "{example}": {listed}')


def nothing_to_do(name: str, counts: Counts, talk: Talk) -> Outcome:
    talk.say(f"{name}: nothing to do ({counts.ok} ok, {counts.failed} failed of {counts.covered} covered)")
    return Outcome()


def _say_classes(layout: Layout, work: Work, talk: Talk) -> None:
    """Reports the classes of a stage's failures in the table, if none of them is the class to try again."""
    with Samples(layout, work.columns, work.shards) as samples:
        classes = ", ".join(f"{kind} ({rows})" for kind, rows, _ in failure_classes(samples, work.stage.name))
    talk.say(f"{work.stage.name}: no row asked for has failed with '{work.choice.retry_class}'; there are: {classes}")


def failure_classes(samples: Samples, name: str) -> list[tuple[Any, ...]]:
    """The classes of a stage's failures, each with its rows and an example, the most frequent first."""
    return samples.fixed(
        f"select split_part({name}_error, ':', 1), count(*), any_value({name}_error) from samples "
        f"where {name}_status = 'failed' group by 1 order by 2 desc, 1"
    )


def is_lasting(pipeline: Pipeline, name: str, outcome: Outcome) -> bool:
    """Whether every row that failed in a stage's run would fail again: see `errors.LASTING`."""
    if outcome.run is None:
        return False
    with Samples(pipeline.layout, Snapshot(pipeline).columns, pipeline.layout.partitions()) as samples:
        failed = samples.fixed(
            f"select distinct split_part({name}_error, ':', 1) from samples "
            f"where {name}_status = 'failed' and {name}_run = '{outcome.run.name}'"
        )
    return bool(failed) and all(kind in LASTING for (kind,) in failed)


def _describe(pipeline: Pipeline, use: StageUse, work: Work) -> RunFiles:
    """Makes the directory of a stage's run."""
    settings = {
        "checkpoint_rows": use.run.checkpoint_rows,
        "checkpoint_seconds": use.run.checkpoint_seconds,
        "max_failed": use.run.max_failed,
        "batch_rows": use.run.batch_rows or use.stage.resources.batch_rows,
    }
    return runs.describe_new(
        pipeline.layout,
        use.stage.name,
        "stage",
        use.run.executor,
        packages=use.stage.packages,
        stage=use.stage.name,
        version=use.stage.version,
        options=use.options.model_dump(mode="json"),
        options_hash=work.signature,
        python_file=python_of(use),
        sql={"origin": work.sql.origin, "text": work.sql.text},
        params=work.params,
        choice=asdict(work.choice),
        image=work.image,
        settings=settings,
        pipeline=pipeline.config.path,
        set=pipeline.config.sets,
    )


def python_of(use: StageUse) -> str | None:
    """Where a stage's code is: `FILE:CLASS`, the file absolute; None if the stage is installed."""
    if not use.table.python:
        return None
    path, _, name = use.table.python.rpartition(":")
    return f"{Path(path).absolute()}:{name}"
