"""Finds the rows that a stage's SQL covers, shard by shard, together with the states of the table's rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builder.engine.states import READ_ROWS, THE_TABLE, covered_rows, states_of, where_clause
from builder.engine.work import ROW_KEYS, WORK_COLUMNS, Work
from builder.errors import ConfigError
from builder.store.layout import Layout
from builder.table import schema
from builder.table.lookups import Lookup
from builder.table.partitions import partition_state
from builder.table.query import Samples
from builder.table.rowwise import Rowwise, rowwise
from builder.table.sql_text import Sql, repeats_a_row

T = TypeVar("T")


def lookups_of(works: Sequence[Work]) -> dict[str, Lookup]:
    """The files that the SQL of any of the works may join, by the name of the view.

    Raises:
        ConfigError: two stages use one name for different files.
    """
    lookups: dict[str, Lookup] = {}
    for work in works:
        for name, lookup in work.lookups.items():
            if lookups.setdefault(name, lookup) != lookup:
                raise ConfigError(
                    f"two stages use the name '{name}' for different files",
                    where={"stage": work.stage.name, "files": f"{lookups[name].files} and {lookup.files}"},
                    fix="name the same files in both",
                )
    return lookups


def in_one_pass_or_two(work: Work, read: Callable[[Rowwise | None, set[str]], T]) -> T:
    """Reads the rows that a work's SQL covers.

    Args:
        read: called with the pieces of the SQL, if it looks at each row on its own and can be read in one pass with the
            table's rows, and with what to sort. The pieces are None for other SQL, and if DuckDB refuses one of them:
            the SQL as written then gives the better error message.
    """
    taken = rowwise(work.sql.text, {column.name for column in work.columns}, work.params)
    if taken is not None:
        with contextlib.suppress(ConfigError):
            return in_order(partial(read, taken))
    return in_order(partial(read, None))


def rows_covered(samples: Samples, work: Work, taken: Rowwise | None, sort: set[str]) -> Iterator[pa.Table]:
    """The rows that a work's SQL returns, shard by shard, with their state and the stage's inputs."""
    if taken is None:
        for _, state, (wanted,) in side_by_side(samples, [work], sort, with_inputs=True):
            if wanted is not None:
                yield covered_rows(state, wanted)
        return
    place = {shard: number for number, shard in enumerate(sorted(work.shards))}
    states = states_of(samples, [work], sort, with_inputs=True, taken=taken)
    for _, covered in _shard_by_shard(states, place, THE_TABLE):
        yield covered


def rows_of(layout: Layout, shard: str) -> str:
    state = partition_state(layout, shard)
    return "" if state is None else state.rows


# --- the rows of the SQL together with the table's ---


class _Unordered(Exception):
    """The rows of a stage's SQL, or those of the table, do not arrive in the table's order."""


def in_order(read: Callable[[set[str]], T]) -> T:
    """Calls `read`, and calls it again from the start whenever one of its streams turns out to be in another order.

    What was read until then may lack rows that come later, so nothing of it is kept.

    Args:
        read: called with the stages whose rows DuckDB has to sort; `THE_TABLE` means the rows of the table.
    """
    sort: set[str] = set()
    while True:
        try:
            return read(sort)
        except _Unordered as unordered:
            if str(unordered) in sort:
                raise
            sort.add(str(unordered))


def side_by_side(
    samples: Samples,
    works: Sequence[Work],
    sort: set[str],
    *,
    with_inputs: bool,
    with_runs: bool = False,
    only: Sequence[str] | None = None,
) -> Iterator[tuple[str, pa.Table, list[pa.Table | None]]]:
    """For every shard: its name, the state of its rows, and its rows that the SQL of each work returns.

    The table and the rows of the SQL are two streams that are merged shard by shard: joining them in SQL would need
    memory for the whole table. This works as long as both arrive in the table's order. SQL that filters keeps the
    order, joins may not; then `_Unordered` is raised, and `in_order` starts again with the rows sorted by DuckDB.

    Args:
        sort: what DuckDB sorts, since it arrives in another order.
        with_inputs: also return the stages' inputs, and what is recorded of the inputs of answers.
        with_runs: also return the run that gave each answer, as `<stage>_given_by`.
        only: the shards to look at, out of those that the SQL is evaluated over; all if None.

    Raises:
        _Unordered: with the name of a stage whose rows have to be sorted.
    """
    shards = sorted(works[0].shards)
    place = {shard: number for number, shard in enumerate(shards)}
    these = ""
    if only is not None and len(only) < len(shards):
        these = f" and {{}}.shard in ({', '.join(schema.literal(shard) for shard in only)})"
    answers = [
        _Answer(_answer(samples, work, place, sort=work.stage.name in sort, with_inputs=with_inputs, these=these))
        for work in works
    ]
    states = states_of(samples, works, sort, with_inputs=with_inputs, with_runs=with_runs, these=these)
    for number, state in _shard_by_shard(states, place, THE_TABLE):
        yield shards[number], state, [answer.of(number) for answer in answers]
    for answer in answers:
        answer.of(len(shards))  # reads to the end, to notice rows that are out of order there


class _Answer:
    """The rows that one work's SQL returns, shard by shard."""

    def __init__(self, groups: Iterator[tuple[int, pa.Table]]) -> None:
        self._groups = groups
        self._next = next(groups, None)

    def of(self, number: int) -> pa.Table | None:
        """The rows of a shard; called in ascending order of shards."""
        while self._next is not None and self._next[0] < number:
            self._next = next(self._groups, None)
        if self._next is None or self._next[0] > number:
            return None
        found = self._next[1]
        self._next = next(self._groups, None)
        return found


def _answer(
    samples: Samples, work: Work, place: dict[str, int], *, sort: bool, with_inputs: bool, these: str
) -> Iterator[tuple[int, pa.Table]]:
    """The rows that a work's SQL returns, by number of the shard; raises ConfigError if a row is returned twice."""
    fields = work.stage.inputs if with_inputs else ()
    inputs = "".join(
        f', cast(w."{field.name}" as {schema.duckdb_type(field.type)}) as "{field.name}"' for field in fields
    )
    order = " order by 1, 2" if sort else ""
    around = (
        f'select cast(w.shard as varchar) as shard, cast(w."row" as bigint) as "row"{inputs} from '
        f"{{}} w where w.shard is not null and w.row is not null{these.format('w')}{order}"
    )
    batches = samples.stream(work.sql, work.params, around=around, rows=READ_ROWS)
    for number, table in _shard_by_shard(batches, place, work.stage.name):
        again = np.flatnonzero(np.diff(table["row"].to_numpy()) == 0)
        if len(again):
            row = table["row"][int(again[0])].as_py()
            raise repeats_a_row("work SQL", work.sql, table["shard"][0].as_py(), row)
        yield number, table


def _shard_by_shard(
    batches: Iterable[pa.RecordBatch], place: dict[str, int], name: str
) -> Iterator[tuple[int, pa.Table]]:
    """The rows of every shard that an answer names, with the shard's number; unknown shards are left out.

    Raises:
        _Unordered: a shard or a row comes back; with `name`.
    """

    def whole() -> tuple[int, pa.Table]:
        table = waiting[0] if len(waiting) == 1 else pa.concat_tables(waiting)
        if (np.diff(table["row"].to_numpy()) < 0).any():
            raise _Unordered(name)
        return current, table

    current = -1
    waiting: list[pa.Table] = []
    for batch in batches:
        runs = pc.run_end_encode(batch.column("shard"))
        start = 0
        for end, shard in zip(runs.run_ends.to_pylist(), runs.values.to_pylist(), strict=True):
            number = place.get(shard, current)
            if number < current:
                raise _Unordered(name)
            if number > current and waiting:
                yield whole()
                waiting = []
            if shard in place:
                current = number
                waiting.append(pa.Table.from_batches([batch.slice(start, end - start)]))
            start = end
    if waiting:
        yield whole()


def check_columns(samples: Samples, work: Work) -> None:
    """Raises ConfigError if the SQL does not return exactly what the stage needs, or a condition is not valid."""
    if condition := work.choice.where:
        samples.select(Sql(f"select (\n{condition}\n) from samples", "--where"))  # nothing that leaves its brackets
        samples.select(where_clause(condition))
    returned = list(samples.columns(work.sql, work.params))
    wanted = [*ROW_KEYS, *(field.name for field in work.stage.inputs)]
    place = {"file": work.sql.origin, "returned": ", ".join(returned)}
    have = {schema.folded(name) for name in returned}
    for name in wanted:
        if name not in have:
            known = {column.name for column in work.columns}
            given = [name if name in known else f"caption as {name}" for name in wanted]
            raise ConfigError(
                f"work SQL returned no column '{name}', which stage '{work.stage.name}' needs",
                where=place,
                fix=f"add it, for example: select {', '.join(given)}",
            )
    for name in wanted:
        if name in WORK_COLUMNS:
            raise ConfigError(
                f"work SQL returned a column '{name}', which is the name of a column of the work set",
                where=place,
                fix=f"give it another name, here and in the inputs of stage '{work.stage.name}'",
            )
    extra = [name for name in returned if schema.folded(name) not in wanted]
    if extra:
        raise ConfigError(
            f"work SQL returned a column '{extra[0]}', which stage '{work.stage.name}' does not take",
            where=place,
            fix=f"return exactly: {', '.join(wanted)}",
        )
