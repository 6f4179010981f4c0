"""The state of a row in a stage (answered, failed, out of date), and which rows a run tries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from builder import formats
from builder.engine import outdated
from builder.engine.work import Choice, Work
from builder.stages.contract import formats_asked
from builder.table import schema
from builder.table.query import Samples
from builder.table.rowwise import Rowwise
from builder.table.sql_text import Sql

#: Rows of one read from DuckDB, and of one row group of the work set.
READ_ROWS = 20_000
#: Means the table itself, among names of stages.
THE_TABLE = ""


#: States of a row in a stage: 0 = no answer, then answered, failed, failed with the class to retry.
OK, FAILED, RETRIED = 1, 2, 3


def states_of(
    samples: Samples,
    works: Sequence[Work],
    sort: set[str],
    *,
    with_inputs: bool,
    with_runs: bool = False,
    these: str = "",
    taken: Rowwise | None = None,
) -> Iterator[pa.RecordBatch]:
    """For every row whose source is ok: shard, row, its state in each stage, and the `suspicion` of its answer.

    Args:
        taken: the pieces of the SQL of the only work: returns only the rows that it returns, with the stage's inputs.
    """
    parts = ["s.shard", "s.row"]
    for work in works:
        name = work.stage.name
        parts.append(f"{state_in_sql(work)} as {name}_state")
        parts.append(f"{outdated.suspicion(work.stage)} as {name}_suspect")
        if with_runs:
            parts.append(f"{run_in_sql(name)} as {name}_given_by")
        if with_inputs:
            parts += ["s.source_changed", *outdated.recorded(work.stage), *_format_of(work)]
    narrowed = where_clause(works[0].choice.where or "true")
    params: dict[str, Any] = {}
    if taken is not None:
        have = {part.rpartition(" as ")[2].removeprefix("s.") for part in parts}
        inputs = [field for field in works[0].stage.inputs if field.name not in have]
        own = unused_name("input", (column.name for column in works[0].columns))
        parts += [f"s.{own}_{number} as {schema.quoted(field.name)}" for number, field in enumerate(inputs)]
        values = "".join(
            f", cast({taken.values[field.name]} as {schema.duckdb_type(field.type)}) as {own}_{number}"
            for number, field in enumerate(inputs)
        )
        text = f"select *{values} from ({narrowed.text}) where ({taken.condition})"
        narrowed, params = Sql(text, narrowed.origin), taken.params_in(text)
    order = " order by s.shard, s.row" if THE_TABLE in sort else ""
    columns = ", ".join(dict.fromkeys(parts))
    around = f"select {columns} from {{}} s where s.source_status = 'ok'{these.format('s')}{order}"
    return samples.stream(narrowed, params, around=around, rows=READ_ROWS)


def state_in_sql(work: Work) -> str:
    """SQL over `samples s`: the state of a row in a stage."""
    name, kind = work.stage.name, work.choice.retry_class
    retried = "false"
    if kind:
        retried = "true" if kind == "failed" else f"starts_with(s.{name}_error, {schema.literal(kind + ':')})"
    return (
        f"(case s.{name}_status when 'ok' then {OK} when 'failed' then"
        f" case when {retried} then {RETRIED} else {FAILED} end else 0 end)::utinyint"
    )


def run_in_sql(name: str) -> str:
    """SQL over `samples s`: the run that gave a row's answer in a stage."""
    return f"case when s.{name}_status is not null then coalesce(s.{name}_run, '') end"


def _format_of(work: Work) -> list[str]:
    """SQL for the format in which a stage is asked for pictures; an empty list if the stage makes none."""
    if not formats_asked(work.stage):
        return []
    asked = f"'{formats.JPG}'"
    if work.image == "source":
        have = "list_transform(s.source_members, lambda m: lower(m.ext))"
        cases = (
            f"when list_contains({have}, '{extension}') then '{kind}'"
            for extension, kind in formats.OF_EXTENSION.items()
        )
        asked = f"case {' '.join(cases)} else {asked} end"  # a sample without a picture has no format to keep
    return [f"{asked} as {work.stage.name}_format_asked"]


def places_in_both(state: pa.Table, wanted: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """For the rows that are in both tables: their positions in `state`, and a mask over `wanted`; both ascending."""
    have, rows = state["row"].to_numpy(), wanted["row"].to_numpy()
    if len(have) == len(rows) and (have == rows).all():
        return np.arange(len(rows)), np.ones(len(rows), bool)
    at = np.searchsorted(have, rows)
    found = (at < len(have)) & (have[np.minimum(at, len(have) - 1)] == rows)
    return at[found], found


def covered_rows(state: pa.Table, wanted: pa.Table) -> pa.Table:
    """The rows that are in both tables, with the columns of both."""
    at, found = places_in_both(state, wanted)
    both = state.take(pa.array(at))
    for name in wanted.column_names:
        if name not in both.column_names:
            both = both.append_column(name, wanted[name].filter(pa.array(found)))
    return both


def is_open(states: np.ndarray, late: np.ndarray, choice: Choice) -> np.ndarray:
    """Which rows a run tries: those without an answer, those out of date, and failures to retry. With a class of
    failures to retry, only these."""
    is_retried = states == RETRIED
    is_alone = choice.retry_class not in (None, "failed")
    return np.asarray(is_retried if is_alone else is_retried | (states == 0) | late)


def is_open_in_sql(state: str, late: str, choice: Choice) -> str:
    """`is_open` in SQL; true for all rows if they are to be done again."""
    if choice.redo:
        return "true"
    is_alone = choice.retry_class not in (None, "failed")
    return f"{state} = {RETRIED}" if is_alone else f"({state} in (0, {RETRIED}) or {late})"


def is_tried(work: Work, covered: pa.Table, late: np.ndarray) -> np.ndarray:
    """Which rows the choice tries.

    Args:
        late: which of them are out of date.
    """
    if work.choice.redo:
        return np.ones(covered.num_rows, bool)
    if work.choice.stale:
        return np.asarray(outdated.are_stale(covered, work.stage, work.signature) | late)
    return is_open(covered[f"{work.stage.name}_state"].to_numpy(), late, work.choice)


def unused_name(name: str, columns: Iterable[str]) -> str:
    """A prefix that no column begins with, for columns that SQL adds to those of the table."""
    taken = {schema.folded(column) for column in columns}
    while any(column.startswith(name) for column in taken):
        name += "_"
    return name


def where_clause(condition: str) -> Sql:
    return Sql(f"select * from samples where (\n{condition}\n)", "--where")
