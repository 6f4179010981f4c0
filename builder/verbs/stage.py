"""The verb `stage`: one stage over its work set."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder.engine import runs, workset
from builder.engine.counting import count_rows
from builder.engine.runs import Outcome
from builder.engine.work import Choice, Counts, Work
from builder.errors import LASTING
from builder.progress import Talk
from builder.stages.contract import columns_of
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import partitions, root_schema
from builder.table.query import Samples
from builder.verbs.pipeline import Pipeline, StageUse, table_shards, use_of, work_of


def run_stage(pipeline: Pipeline, name: str, choice: Choice, talk: Talk) -> Outcome:
    """Runs one stage over its work set.

    Raises:
        BuilderError: bad SQL, a stage that cannot start, a task that did not finish.
    """
    layout, use = pipeline.layout, use_of(pipeline, name)
    layout.check_folders()
    shards = table_shards(pipeline)
    work = work_of(pipeline, name, choice, shards)
    root_schema.extend_schema(layout, columns_of(use.stage))
    partitions.heal(layout, shards)
    unnamed = layout.runs / "workset.parquet"
    frozen = files.temp_path(unnamed)
    try:
        with files.naming(unnamed):
            slices = workset.freeze(layout, frozen, work)
        if not slices:
            [counts] = count_rows(layout, [work])
            if choice.retry and counts.failed:
                _tell_classes(layout, work, talk)
            return nothing_to_do(name, counts, talk)
        if notice := getattr(use.stage, "notice", ""):
            talk.say(f"{name}: {notice}")
        if again := sum(part.again for part in slices):
            talk.say(f"{name}: {again} rows are answered again: their inputs have changed since")
        run = runs.new_run(layout, name)
        _describe_stage(pipeline, run, use, work)
        files.write_atomic(run.workset, frozen.replace)
    finally:
        frozen.unlink(missing_ok=True)
    dealt = workset.cut(slices, use.run.workers)
    workset.write_tasks(run, dealt)
    outcome = runs.execute(run, len(dealt), use.run, talk, name, sum(part.count for part in slices), "rows")
    for line in getattr(use.stage, "summary", lambda totals: [])(outcome.totals):
        talk.say(f"{name}: {line}")
    if column := getattr(use.stage, "noting", ""):
        _tell_notes(pipeline, work, column, run.folder.name, talk)
    return outcome


def _tell_notes(pipeline: Pipeline, work: Work, column: str, run: str, talk: Talk) -> None:
    """Says of how many rows a run has noted that something was not taken as it came."""
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


def _tell_classes(layout: Layout, work: Work, talk: Talk) -> None:
    """Says of what classes a stage's failures in the table are: no row asked for is of the one to try again."""
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
    if outcome.folder is None:
        return False
    with Samples(pipeline.layout, pipeline.columns(), pipeline.layout.partitions()) as samples:
        failed = samples.fixed(
            f"select distinct split_part({name}_error, ':', 1) from samples "
            f"where {name}_status = 'failed' and {name}_run = '{outcome.folder.name}'"
        )
    return bool(failed) and all(kind in LASTING for (kind,) in failed)


def _describe_stage(pipeline: Pipeline, run: RunFiles, use: StageUse, work: Work) -> None:
    settings = {
        "checkpoint_rows": use.run.checkpoint_rows,
        "checkpoint_seconds": use.run.checkpoint_seconds,
        "max_failed": use.run.max_failed,
        "batch_rows": use.run.batch_rows or use.stage.resources.batch_rows,
    }
    runs.describe(
        run,
        "stage",
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
    """Where the code of a stage of one's own lies: `FILE:CLASS`, the file absolute; None for an installed one."""
    if not use.table.python:
        return None
    path, _, name = use.table.python.rpartition(":")
    return f"{Path(path).absolute()}:{name}"
