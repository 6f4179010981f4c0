"""Runs made by hand: a work set frozen and cut as `builder stage` does it, its tasks started by the test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa

from builder.engine import runs, workset
from builder.engine.task import run_stage_task
from builder.engine.task_state import Result, TaskSettings
from builder.engine.work import Choice, Work
from builder.progress import Talk
from builder.stages.contract import Stage, columns_of
from builder.stages.signature import options_hash
from builder.store.layout import Layout, RunFiles
from builder.table import partitions, root_schema, schema
from builder.table.sql_text import Sql
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot
from builder.verbs.stage import plan_stage_run
from conftest import STAGES

#: Work SQL of the stages of tests/support/stages.py.
SQL = "select shard, row, uid, key, caption as text from samples"


def section(kind: str, sql: str = "note.sql", *, name: str = "note", **options: Any) -> str:
    """`[stages.<name>]` for a stage of tests/support/stages.py; options are TOML values as text."""
    lines = [f"[stages.{name}]", f'python = "{STAGES}:{kind}"', f'sql = "{sql}"']
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in options.items())]) + "\n"


def work_of(layout: Layout, stage: Stage, choice: Choice = Choice(), sql: str = SQL, **params: Any) -> Work:  # noqa: B008
    """The work of a stage over the whole table."""
    columns = schema.merge(root_schema.load_schema(layout)[1], columns_of(stage))
    signature = options_hash(stage, stage.options)  # type: ignore[attr-defined]
    return Work(stage, Sql(sql, "work.sql"), params, choice, layout.shard_names(), columns, signature)


def plan(layout: Layout, stage: Stage, choice: Choice = Choice(), sql: str = SQL, **params: Any) -> RunFiles:  # noqa: B008
    """Freezes the work of a stage as one task; returns its run."""
    root_schema.extend_schema(layout, columns_of(type(stage)))
    partitions.heal(layout, layout.shard_names())
    run = RunFiles(layout, runs.new_name(type(stage).name))
    slices = workset.freeze(layout, run.workset, work_of(layout, stage, choice, sql, **params))
    runs.write_tasks(run, [workset.task_of(task) for task in workset.cut(slices, 1)])
    return run


def do(
    layout: Layout,
    run: RunFiles,
    stage: Stage,
    *,
    checkpoint_rows: int = 1000,
    checkpoint_seconds: float = 1000,
    max_failed: float = 1,
    batch_rows: int = 4,
    **options: Any,
) -> Result:
    """Does task 0 of a run in this process."""
    settings = TaskSettings(checkpoint_rows, checkpoint_seconds, max_failed, batch_rows)
    return run_stage_task(layout, run, 0, stage, settings, **options)


def described(pipeline: Pipeline, name: str, choice: Choice, tasks: int) -> RunFiles:
    """A run as `builder stage NAME` leaves it before it starts its tasks: `builder task RUN 0` does one."""
    use = pipeline.stages[name]
    pipeline.stages[name] = replace(use, run=use.run.model_copy(update={"workers": tasks}))
    planned = plan_stage_run(Snapshot(pipeline), name, choice, Talk(quiet=True))
    assert planned is not None
    return planned.files


def rows_of(frozen: pa.Table) -> list[tuple[str, int]]:
    """Shard and row of a work set."""
    return list(zip(frozen["shard"].to_pylist(), frozen["row"].to_pylist(), strict=True))
