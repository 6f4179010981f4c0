"""Work sets: evaluate a stage's SQL once, keep the rows to do, freeze them, cut them into tasks.

Owns `runs/<run>/workset.parquet` and `tasks/`. The table is the only book of what is done; a work set only says what
one run will try.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builder import formats
from builder.engine import outdated
from builder.errors import ConfigError, ConflictError
from builder.stages.contract import Stage, formats_asked
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import schema
from builder.table.partitions import partition_state
from builder.table.query import Lookup, Samples, Sql
from builder.table.rowwise import Rowwise, rowwise
from builder.table.schema import Column

T = TypeVar("T")
#: Rows of one read from DuckDB, and of one row group of the work set.
_CHUNK = 20_000
_KEYS = ("shard", "row", "uid")
#: Stands among the names of stages for the table itself.
_TABLE = ""
#: What `Choice.retry` may be: all failed rows, or those of one class of error, which is a word.
_RETRY = re.compile(r"failed(:[A-Za-z]\w*)?")
#: How often a freeze is tried while shards are being ingested beside it.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Choice:
    """Which of the rows that the SQL covers a run tries: those without an answer, and those that are out of date.

    Attributes:
        retry: failed rows: with `failed` all of them, too; with `failed:CLASS` those of that class of error alone, and
            no others.
        redo: rows with an answer too.
        stale: rows whose inputs, stage version or options differ from those of their answer.
        where: a condition over `samples` that narrows any of these.
        next_draw: with another draw than that of the answer, for stages whose SQL uses $draw.
    """

    retry: str | None = None
    redo: bool = False
    stale: bool = False
    where: str | None = None
    next_draw: bool = False

    @property
    def retry_class(self) -> str | None:
        """The class of errors to retry; `failed` for all."""
        return None if self.retry is None else self.retry.removeprefix("failed:")

    def __post_init__(self) -> None:
        if self.retry is not None and not _RETRY.fullmatch(self.retry):
            kind = self.retry.rpartition(":")[2]
            is_class = re.fullmatch(r"[A-Za-z]\w+", kind) is not None and kind.lower().rstrip("ed") != "fail"
            raise ConfigError(
                f"--retry takes 'failed' or 'failed:CLASS', not '{self.retry}'",
                fix=f"for one class of error: --retry failed:{kind}"
                if is_class
                else "for all failed rows: --retry failed",
            )
        given = [f"--{name}" for name in ("retry", "redo", "stale") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} say different things",
                fix="give one: --retry failed rows, --redo all rows, --stale rows whose inputs or options changed",
            )
        if self.next_draw and not self.redo:
            raise ConfigError(
                "--draw next is for rows with an answer", fix="--redo --draw next --where 'check_faces = 0'"
            )


@dataclass(frozen=True)
class Slice:
    """Rows of one shard in a work set.

    Attributes:
        first: position of the first row in `workset.parquet`.
        rows: identity of the shard's rows that the positions follow.
        again: of the rows, those whose answer is out of date.
    """

    shard: str
    first: int
    count: int
    rows: str
    again: int = 0


@dataclass(frozen=True)
class Counts:
    """What a stage's SQL covers, by state.

    Attributes:
        covered: rows that the SQL returns and whose source is fine.
        todo: of these, rows that a run with this choice tries.
        ok: of these, rows with an answer.
        failed: of these, failed rows.
        outside: rows with an answer that the SQL no longer covers.
        shards: shards that hold rows to try.
        out_of_date: of ok and failed, rows whose own inputs changed since: see `builder.engine.outdated`.
    """

    covered: int = 0
    todo: int = 0
    ok: int = 0
    failed: int = 0
    outside: int = 0
    shards: int = 0
    out_of_date: int = 0


@dataclass(frozen=True)
class Work:
    """The work of one stage: its SQL, parameters and choice, over certain shards.

    Attributes:
        columns: the root's columns with the stage's own.
        signature: `stage.options_hash`, half of every row's inputs hash.
        image: the format that pictures are asked for: the one of the sample's own, or `jpg` always.
    """

    stage: Stage
    sql: Sql
    params: dict[str, Any]
    choice: Choice
    shards: Sequence[str]
    columns: Sequence[Column]
    signature: str
    image: Literal["source", "jpg"] = "source"

    @property
    def lookups(self) -> Mapping[str, Lookup]:
        """The files that the SQL may join."""
        found: Mapping[str, Lookup] = getattr(self.stage, "lookups", {})
        return found


def _lookups_of(works: Sequence[Work]) -> dict[str, Lookup]:
    """The files that the SQL of any of the works may join, by the name of the view.

    Raises:
        ConfigError: two stages have other files under one name.
    """
    found: dict[str, Lookup] = {}
    for work in works:
        for name, lookup in work.lookups.items():
            if found.setdefault(name, lookup) != lookup:
                raise ConfigError(
                    f"two stages look things up in '{name}', but in other files",
                    where={"stage": work.stage.name, "files": f"{found[name].files} and {lookup.files}"},
                    fix="name the same files in both",
                )
    return found


def count(layout: Layout, works: Sequence[Work], by_run: dict[str, Counter[str]] | None = None) -> list[Counts]:
    """Counts the rows of several stages' works, over the same shards and with one choice; starts nothing.

    In one pass that reads no inputs; a second one reads those of shards that hold samples that changed.

    Args:
        by_run: takes of each stage how many of its answers each run gave, `''` for none, among the rows that the
            choice's condition leaves and whose source is fine.
    """
    if not works:
        return []
    first = works[0]
    columns = list(dict.fromkeys(column for work in works for column in work.columns))
    deciding = [work.sql for work in works]
    with Samples(layout, columns, sorted(first.shards), _lookups_of(works), deciding=deciding) as samples:
        for work in works:
            _check_columns(samples, work)
        counts, put_off = _counted_by_shard(layout, samples, works, columns, by_run)
        for place, work in enumerate(works):
            if put_off[place]:
                count_rest = partial(_counted_with_inputs, layout, samples, work, put_off[place], counts[place])
                counts[place] = _in_order(count_rest)
        return counts


def _counted_by_shard(
    layout: Layout,
    samples: Samples,
    works: Sequence[Work],
    columns: Sequence[Column],
    by_run: dict[str, Counter[str]] | None,
) -> tuple[list[Counts], list[list[str]]]:
    """What `_counted` says; of works whose SQL looks at every row on its own in one pass for all of them."""
    names = {column.name for column in columns}
    pieces: dict[int, Rowwise] = {}
    for place, work in enumerate(works):
        taken = rowwise(work.sql.text, names, work.params, f"of_{place}")
        if taken is not None and not work.choice.stale:
            pieces[place] = taken
    try:
        found = _counted_at_once(samples, works, pieces, by_run) if pieces else {}
    except ConfigError:
        found = {}  # a stage's own SQL says what is wrong with it
    others = [place for place in range(len(works)) if place not in found]
    if others:
        counts, put_off = _in_order(partial(_counted, layout, samples, [works[place] for place in others], by_run))
        found |= dict(zip(others, zip(counts, put_off, strict=True), strict=True))
    ordered = [found[place] for place in range(len(works))]
    return [counts for counts, _ in ordered], [put_off for _, put_off in ordered]


def _counted_at_once(
    samples: Samples,
    works: Sequence[Work],
    pieces: Mapping[int, Rowwise],
    by_run: dict[str, Counter[str]] | None,
) -> dict[int, tuple[Counts, list[str]]]:
    """The counts of these works by place, and the shards of each that are put off."""
    covers = _unused("is_covered", (column.name for work in works for column in work.columns))
    rows, sums = ["s.shard"], ["shard"]
    for place in pieces:
        work, of = works[place], f"filter ({covers}_{place}"
        state, suspect = f"state_{place}", f"suspect_{place}"
        late = f"{suspect} = {outdated.OTHER_BYTES}"
        rows += [
            f"coalesce(s.{covers}_{place}, false) as {covers}_{place}",
            f"{_state_of(work)} as {state}",
            f"{outdated.suspicion(work.stage)} as {suspect}",
        ]
        sums += [
            f"count(*) {of})",
            f"count(*) {of} and {_is_open_in_sql(state, late, work.choice)})",
            f"count(*) {of} and {state} = {_OK})",
            f"count(*) {of} and {state} >= {_FAILED})",
            f"count(*) filter (not {covers}_{place} and {state} = {_OK})",
            f"count(*) {of} and {late})",
            f"count(*) {of} and {suspect} = {outdated.SUSPECT})",
        ]
        if by_run is not None:
            rows.append(f"{_given_by(work.stage.name)} as given_by_{place}")
            sums.append(f"histogram(given_by_{place}) filter (given_by_{place} is not null)")
    around = (
        f"select {', '.join(sums)} from (select {', '.join(rows)} from {{}} s where s.source_status = 'ok') "
        "group by shard order by shard"
    )
    params: dict[str, Any] = {}
    for taken in pieces.values():
        params |= taken.params_in(taken.condition)
    covered = ", ".join(f"({taken.condition}) as {covers}_{place}" for place, taken in pieces.items())
    narrowed = _where(works[0].choice.where or "true")
    asked = Sql(f"select *, {covered} from ({narrowed.text})", narrowed.origin)
    answer = samples.rows(asked, params, around=around)
    found = {place: (Counts(), list[str]()) for place in pieces}
    tallies = {place: Counter[str]() for place in pieces}
    for shard, *values in answer:
        for place in pieces:
            rows_covered, todo, ok, failed, outside, late_ones, suspects = values[:7]
            values = values[7:]
            counts, put_off = found[place]
            if by_run is not None:
                tallies[place].update(values.pop(0) or {})
            if suspects:
                put_off.append(shard)
                continue
            new = Counts(rows_covered, todo, ok, failed, outside, bool(todo), late_ones)
            found[place] = _sum(counts, new), put_off
    if by_run is not None:
        by_run.update((works[place].stage.name, tally) for place, tally in tallies.items())
    return found


def _sum(one: Counts, other: Counts) -> Counts:
    return Counts(*(getattr(one, field.name) + getattr(other, field.name) for field in fields(Counts)))


def _counted(
    layout: Layout,
    samples: Samples,
    works: Sequence[Work],
    by_run: dict[str, Counter[str]] | None,
    sort: set[str],
) -> tuple[list[Counts], list[list[str]]]:
    """The counts of every work; for each the shards that are put off, since answers in it have to be compared."""
    found = [Counts() for _ in works]
    put_off: list[list[str]] = [[] for _ in works]
    with_inputs, with_runs = works[0].choice.stale, by_run is not None
    if by_run is not None:
        by_run.update((work.stage.name, Counter()) for work in works)  # anew, where the rows are read again in order
    for shard, state, wanted in _side_by_side(samples, works, sort, with_inputs=with_inputs, with_runs=with_runs):
        if by_run is not None:
            for name in {work.stage.name for work in works}:  # others are counted in one pass
                _tally(by_run[name], state[f"{name}_given_by"])
        for place, (work, rows) in enumerate(zip(works, wanted, strict=True)):
            if rows is None:
                answered = int(np.count_nonzero(state[f"{work.stage.name}_state"].to_numpy() == _OK))
                found[place] = replace(found[place], outside=found[place].outside + answered)
            elif not with_inputs and _has_suspects(work, state, rows):
                put_off[place].append(shard)
            else:
                found[place] = _added(layout, found[place], work, state, rows, with_inputs=with_inputs)
    return found, put_off


def _counted_with_inputs(
    layout: Layout, samples: Samples, work: Work, shards: Sequence[str], counts: Counts, sort: set[str]
) -> Counts:
    """`counts` and the rows of these shards."""
    for _, state, (rows,) in _side_by_side(samples, [work], sort, with_inputs=True, only=shards):
        if rows is not None:
            counts = _added(layout, counts, work, state, rows, with_inputs=True)
    return counts


def _tally(runs: Counter[str], given_by: pa.ChunkedArray) -> None:
    for found in pc.value_counts(given_by).to_pylist():
        if found["values"] is not None:
            runs[found["values"]] += found["counts"]


def _has_suspects(work: Work, state: pa.Table, wanted: pa.Table) -> bool:
    is_suspect = state[f"{work.stage.name}_suspect"].to_numpy() == outdated.SUSPECT
    if not is_suspect.any():
        return False
    at, _ = _places(state, wanted)
    return bool(is_suspect[at].any())


def _added(
    layout: Layout, counts: Counts, work: Work, state: pa.Table, wanted: pa.Table, *, with_inputs: bool
) -> Counts:
    """`counts` and one shard's rows."""
    name = work.stage.name
    states = state[f"{name}_state"].to_numpy()
    at, _ = _places(state, wanted)
    of = states[at]
    ok = int(np.count_nonzero(of == _OK))
    if with_inputs:
        covered = _covered(state, wanted)
        late = outdated.are_out_of_date(covered, work.stage, work.signature, layout)
        todo = int(np.count_nonzero(_tried(work, covered, late)))
    else:
        late = state[f"{name}_suspect"].to_numpy()[at] == outdated.OTHER_BYTES
        todo = len(of) if work.choice.redo else int(np.count_nonzero(_is_open(of, late, work.choice)))
    return Counts(
        covered=counts.covered + len(of),
        todo=counts.todo + todo,
        ok=counts.ok + ok,
        failed=counts.failed + int(np.count_nonzero(of >= _FAILED)),
        outside=counts.outside + int(np.count_nonzero(states == _OK)) - ok,
        shards=counts.shards + bool(todo),
        out_of_date=counts.out_of_date + int(np.count_nonzero(late)),
    )


def freeze(layout: Layout, path: Path, work: Work) -> list[Slice]:
    """Evaluates the SQL once and writes the rows to try to a file, sorted by shard and row.

    Raises:
        ConfigError: the SQL returns other columns than the stage needs, or a row twice.
        ConflictError: shards were ingested again all the while.
    """
    files.make_folder(path.parent)
    for _ in range(_ATTEMPTS):
        with Samples(layout, work.columns, sorted(work.shards), work.lookups, deciding=[work.sql]) as samples:
            _check_columns(samples, work)
            before = {shard: _rows_of(layout, shard) for shard in work.shards}
            slices = _in_one_pass_or_two(work, partial(_frozen_to, layout, path, samples, work, before))
        if all(_rows_of(layout, part.shard) == part.rows for part in slices):
            return slices
    raise ConflictError("shards were ingested again while the work set was frozen", fix="run the same command again")


def first_rows(layout: Layout, work: Work, count: int, *, repeatable: bool = True) -> pa.Table:
    """The first rows that a freeze would write; writes nothing.

    Args:
        repeatable: whether SQL in which the machine decides something is refused, as a freeze does.
    """
    deciding = [work.sql] if repeatable else []
    with Samples(layout, work.columns, sorted(work.shards), work.lookups, deciding=deciding) as samples:
        _check_columns(samples, work)

        def read(taken: Rowwise | None, sort: set[str]) -> list[pa.Table]:
            parts: list[pa.Table] = []
            for part, _ in _frozen(layout, samples, work, taken, sort):
                parts.append(part)
                if sum(table.num_rows for table in parts) >= count:
                    break
            return parts

        parts = _in_one_pass_or_two(work, read)
    return pa.concat_tables(parts).slice(0, count) if parts else pa.table({})


def _in_one_pass_or_two(work: Work, read: Callable[[Rowwise | None, set[str]], T]) -> T:
    """Reads the rows that a work's SQL covers.

    Args:
        read: is given the pieces of SQL that looks at every row alone, which is read with the table's rows in one pass,
            and what to sort; None for other SQL, and where DuckDB refuses a piece: then it says itself what is wrong.
    """
    taken = rowwise(work.sql.text, {column.name for column in work.columns}, work.params)
    if taken is not None:
        with contextlib.suppress(ConfigError):
            return _in_order(partial(read, taken))
    return _in_order(partial(read, None))


def _frozen_to(
    layout: Layout,
    path: Path,
    samples: Samples,
    work: Work,
    rows: dict[str, str],
    taken: Rowwise | None,
    sort: set[str],
) -> list[Slice]:
    return _write(_frozen(layout, samples, work, taken, sort), path, rows)


def _frozen(
    layout: Layout, samples: Samples, work: Work, taken: Rowwise | None, sort: set[str]
) -> Iterator[tuple[pa.Table, int]]:
    """The rows to try, shard by shard, as the work set holds them, and how many of them are out of date."""
    for covered in _rows_covered(samples, work, taken, sort):
        late = outdated.are_out_of_date(covered, work.stage, work.signature, layout)
        tried = _tried(work, covered, late)
        if tried.any():
            rows = covered.filter(pa.array(tried))
            yield _as_work(rows, work), int(np.count_nonzero(late & tried))


def _rows_covered(samples: Samples, work: Work, taken: Rowwise | None, sort: set[str]) -> Iterator[pa.Table]:
    """The rows of each shard that a work's SQL returns, with their state and the stage's inputs."""
    if taken is None:
        for _, state, (wanted,) in _side_by_side(samples, [work], sort, with_inputs=True):
            if wanted is not None:
                yield _covered(state, wanted)
        return
    place = {shard: number for number, shard in enumerate(sorted(work.shards))}
    states = _states(samples, [work], sort, with_inputs=True, taken=taken)
    for _, covered in _shard_by_shard(states, place, _TABLE):
        yield covered


def _rows_of(layout: Layout, shard: str) -> str:
    state = partition_state(layout, shard)
    return "" if state is None else state.rows


def _write(parts: Iterator[tuple[pa.Table, int]], path: Path, rows: dict[str, str]) -> list[Slice]:
    slices: list[Slice] = []
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []
    position = 0
    try:
        for part, again in parts:
            shard = part["shard"][0].as_py()
            slices.append(Slice(shard, position, part.num_rows, rows[shard], again))
            position += part.num_rows
            waiting.append(part)
            if writer is None:
                writer = pq.ParquetWriter(path, part.schema, compression="zstd", compression_level=1)
            if sum(table.num_rows for table in waiting) >= _CHUNK:
                writer.write_table(pa.concat_tables(waiting), row_group_size=_CHUNK)
                waiting.clear()
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=_CHUNK)
        return slices
    finally:
        if writer is not None:
            writer.close()
        else:
            path.touch()


# --- the SQL's rows beside the table's ---


class _Unordered(Exception):
    """The answer of a stage's SQL, or what a condition leaves of the table, is not in the table's order."""


def _in_order(read: Callable[[set[str]], T]) -> T:
    """Reads answers beside the table, from the start again whenever one turns out to be in another order.

    What was read of it until then may lack rows that come later, so nothing of it is kept.

    Args:
        read: is given the stages whose answer DuckDB has to sort, `_TABLE` for the rows of the table.
    """
    sort: set[str] = set()
    while True:
        try:
            return read(sort)
        except _Unordered as unordered:
            if str(unordered) in sort:
                raise
            sort.add(str(unordered))


def _side_by_side(
    samples: Samples,
    works: Sequence[Work],
    sort: set[str],
    *,
    with_inputs: bool,
    with_runs: bool = False,
    only: Sequence[str] | None = None,
) -> Iterator[tuple[str, pa.Table, list[pa.Table | None]]]:
    """For every shard its name, the state of its rows, and the rows that the SQL of each work returns of it.

    Both are read once, in the order of the table, so that memory does not grow with it: SQL that filters keeps that
    order; joins, and conditions with subqueries, may not.

    Args:
        sort: what DuckDB sorts, since it comes in another order.
        with_inputs: with the stages' inputs, and what rows have recorded of those of their answers.
        with_runs: with the run that gave each answer, as `<stage>_given_by`.
        only: the shards to look at, of those that the SQL is evaluated over; all if absent.

    Raises:
        _Unordered: with the name of a stage that has to be sorted.
    """
    shards = sorted(works[0].shards)
    place = {shard: number for number, shard in enumerate(shards)}
    these = ""
    if only is not None and len(only) < len(shards):
        these = f" and {{}}.shard in ({', '.join(_quoted(shard) for shard in only)})"
    answers = [
        _Answer(_answer(samples, work, place, sort=work.stage.name in sort, with_inputs=with_inputs, these=these))
        for work in works
    ]
    states = _states(samples, works, sort, with_inputs=with_inputs, with_runs=with_runs, these=these)
    for number, state in _shard_by_shard(states, place, _TABLE):
        yield shards[number], state, [answer.of(number) for answer in answers]
    for answer in answers:
        answer.of(len(shards))  # to its end: rows that come back there count, too


class _Answer:
    """What one work's SQL returns, shard by shard."""

    def __init__(self, groups: Iterator[tuple[int, pa.Table]]) -> None:
        self._groups = groups
        self._next = next(groups, None)

    def of(self, number: int) -> pa.Table | None:
        """The rows of a shard; asked for in ascending order."""
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
    """What a work's SQL returns, by number of the shard; no row twice."""
    inputs = "".join(
        f', cast(w."{field.name}" as {schema.duckdb_type(field.type)}) as "{field.name}"' for field in work.stage.inputs
    )
    around = (
        f'select cast(w.shard as varchar) as shard, cast(w."row" as bigint) as "row"{inputs * with_inputs} from '
        f"{{}} w where w.shard is not null and w.row is not null{these.format('w')}{' order by 1, 2' * sort}"
    )
    batches = samples.stream(work.sql, work.params, around=around, rows=_CHUNK)
    for number, table in _shard_by_shard(batches, place, work.stage.name):
        again = np.flatnonzero(np.diff(table["row"].to_numpy()) == 0)
        if len(again):
            row = table["row"][int(again[0])].as_py()
            raise ConfigError(
                f"work SQL returns row {row} of shard '{table['shard'][0].as_py()}' more than once",
                where={"file": work.sql.origin},
                fix="each sample once: select distinct on (shard, row), or aggregate the join that repeats it",
            )
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


#: States of a row in a stage, as `_states` counts them: no answer, an answer, failed, failed with the class to retry.
_OK, _FAILED, _RETRIED = 1, 2, 3


def _states(
    samples: Samples,
    works: Sequence[Work],
    sort: set[str],
    *,
    with_inputs: bool,
    with_runs: bool = False,
    these: str = "",
    taken: Rowwise | None = None,
) -> Iterator[pa.RecordBatch]:
    """Of every row whose source is fine: shard, row, its state in each stage, and whether its answer is suspected.

    Args:
        taken: the pieces of the only work's SQL: only rows that it returns, and the stage's inputs of them.
    """
    parts = ["s.shard", "s.row"]
    for work in works:
        name = work.stage.name
        parts.append(f"{_state_of(work)} as {name}_state")
        parts.append(f"{outdated.suspicion(work.stage)} as {name}_suspect")
        if with_runs:
            parts.append(f"{_given_by(name)} as {name}_given_by")
        if with_inputs:
            parts += ["s.source_changed", *outdated.recorded(work.stage), *_format_of(work)]
    narrowed = _where(works[0].choice.where or "true")
    params: dict[str, Any] = {}
    if taken is not None:
        have = {part.rpartition(" as ")[2].removeprefix("s.") for part in parts}
        inputs = [field for field in works[0].stage.inputs if field.name not in have]
        own = _unused("input", (column.name for column in works[0].columns))
        parts += [f"s.{own}_{number} as {schema.quoted(field.name)}" for number, field in enumerate(inputs)]
        values = "".join(
            f", cast({taken.values[field.name]} as {schema.duckdb_type(field.type)}) as {own}_{number}"
            for number, field in enumerate(inputs)
        )
        text = f"select *{values} from ({narrowed.text}) where ({taken.condition})"
        narrowed, params = Sql(text, narrowed.origin), taken.params_in(text)
    order = " order by s.shard, s.row" if _TABLE in sort else ""
    columns = ", ".join(dict.fromkeys(parts))
    around = f"select {columns} from {{}} s where s.source_status = 'ok'{these.format('s')}{order}"
    return samples.stream(narrowed, params, around=around, rows=_CHUNK)


def _state_of(work: Work) -> str:
    """SQL over `samples s`: the state of a row in a stage."""
    name, kind = work.stage.name, work.choice.retry_class
    retried = "false"
    if kind:
        retried = "true" if kind == "failed" else f"starts_with(s.{name}_error, {_quoted(kind + ':')})"
    return (
        f"(case s.{name}_status when 'ok' then {_OK} when 'failed' then"
        f" case when {retried} then {_RETRIED} else {_FAILED} end else 0 end)::utinyint"
    )


def _given_by(name: str) -> str:
    """SQL over `samples s`: the run that gave a row's answer in a stage."""
    return f"case when s.{name}_status is not null then coalesce(s.{name}_run, '') end"


def _format_of(work: Work) -> list[str]:
    """The format in which a stage is asked for pictures."""
    if not formats_asked(work.stage):
        return []
    told = f"'{formats.JPG}'"
    if work.image == "source":
        have = "list_transform(s.source_members, lambda m: lower(m.ext))"
        cases = (
            f"when list_contains({have}, '{extension}') then '{found}'"
            for extension, found in formats.OF_EXTENSION.items()
        )
        told = f"case {' '.join(cases)} end"
    return [f"{told} as {work.stage.name}_format_asked"]


def _places(state: pa.Table, wanted: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows that are in both: where they stand in `state`, and which of `wanted` they are; both ascend."""
    have, rows = state["row"].to_numpy(), wanted["row"].to_numpy()
    if len(have) == len(rows) and (have == rows).all():
        return np.arange(len(rows)), np.ones(len(rows), bool)
    at = np.searchsorted(have, rows)
    found = (at < len(have)) & (have[np.minimum(at, len(have) - 1)] == rows)
    return at[found], found


def _covered(state: pa.Table, wanted: pa.Table) -> pa.Table:
    """The rows that are in both, with the columns of both."""
    at, found = _places(state, wanted)
    both = state.take(pa.array(at))
    for name in wanted.column_names:
        if name not in both.column_names:
            both = both.append_column(name, wanted[name].filter(pa.array(found)))
    return both


def _is_open(states: np.ndarray, late: np.ndarray, choice: Choice) -> np.ndarray:
    """Which rows a run tries: those without an answer, those out of date and failures to retry; of a class of failures
    these alone."""
    is_retried = states == _RETRIED
    is_alone = choice.retry_class not in (None, "failed")
    return np.asarray(is_retried if is_alone else is_retried | (states == 0) | late)


def _is_open_in_sql(state: str, late: str, choice: Choice) -> str:
    """`_is_open`, and all rows of a choice to do them again."""
    if choice.redo:
        return "true"
    is_alone = choice.retry_class not in (None, "failed")
    return f"{state} = {_RETRIED}" if is_alone else f"({state} in (0, {_RETRIED}) or {late})"


def _tried(work: Work, covered: pa.Table, late: np.ndarray) -> np.ndarray:
    """Which rows the choice tries.

    Args:
        late: which of them are out of date.
    """
    if work.choice.redo:
        return np.ones(covered.num_rows, bool)
    if work.choice.stale:
        return np.asarray(outdated.are_stale(covered, work.stage, work.signature) | late)
    return _is_open(covered[f"{work.stage.name}_state"].to_numpy(), late, work.choice)


def _as_work(rows: pa.Table, work: Work) -> pa.Table:
    """Rows as a work set holds them."""
    result = rows.append_column("inputs", outdated.inputs_now(rows, work.stage, work.signature))
    for field in work.stage.inputs:
        at = result.column_names.index(field.name)
        result = result.set_column(at, field.name, result[field.name].cast(field.type))
    result = result.append_column("previous_run", result[f"{work.stage.name}_by"])
    for name in formats_asked(work.stage):
        result = result.append_column(name, rows[f"{work.stage.name}_format_asked"])
    names = [*(field.name for field in work.stage.inputs), *formats_asked(work.stage)]
    return result.select([*_KEYS, *names, "previous_run", "inputs", "source_changed"])


def _unused(name: str, columns: Iterable[str]) -> str:
    """A name with which no column begins: SQL that adds a column to all of the table would find two of one name."""
    taken = {schema.folded(column) for column in columns}
    while any(column.startswith(name) for column in taken):
        name += "_"
    return name


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _where(condition: str) -> Sql:
    return Sql(f"select * from samples where (\n{condition}\n)", "--where")


def _check_columns(samples: Samples, work: Work) -> None:
    """Refuses SQL that does not return exactly what the stage needs, and a condition that is none."""
    if condition := work.choice.where:
        samples.select(Sql(f"select (\n{condition}\n) from samples", "--where"))  # nothing that leaves its brackets
        samples.select(_where(condition))
    returned = samples.names(work.sql, work.params)
    wanted = [*_KEYS, *(field.name for field in work.stage.inputs)]
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
    extra = [name for name in returned if schema.folded(name) not in wanted]
    if extra:
        raise ConfigError(
            f"work SQL returned a column '{extra[0]}', which stage '{work.stage.name}' does not take",
            where=place,
            fix=f"return exactly: {', '.join(wanted)}",
        )


def cut(slices: Sequence[Slice], tasks: int) -> list[list[Slice]]:
    """Deals whole shards to at most `tasks` tasks: neighbours together, about the same number of rows each."""
    total = sum(part.count for part in slices)
    dealt: list[list[Slice]] = []
    done = 0
    for part in slices:
        middle = done + part.count / 2
        number = min(int(middle * tasks / total), tasks - 1)
        while len(dealt) <= number:
            dealt.append([])
        dealt[number].append(part)
        done += part.count
    return [task for task in dealt if task]


def write_tasks(run: RunFiles, tasks: Sequence[Sequence[Slice]]) -> None:
    for number, task in enumerate(tasks):
        text = json.dumps({"slices": [asdict(part) for part in task]}, indent=1)
        files.write_atomic(run.task(number), text.encode())


def read_task(run: RunFiles, number: int) -> list[Slice]:
    data = json.loads(run.task(number).read_text("utf-8"))
    return [Slice(**part) for part in data["slices"]]


def read_slice(run: RunFiles, part: Slice) -> pa.Table:
    """The rows of one shard: shard, row, uid, the stage's inputs, previous_run, inputs, source_changed."""
    file, ends = _opened(run.workset, run.workset.stat().st_ino)
    groups = range(
        int(np.searchsorted(ends, part.first, "right")),
        int(np.searchsorted(ends, part.first + part.count, "left")) + 1 if part.count else 0,
    )
    before = int(ends[groups.start - 1]) if groups.start else 0
    return file.read_row_groups(list(groups)).slice(part.first - before, part.count)


@lru_cache(maxsize=1)
def _opened(path: Path, inode: int) -> tuple[pq.ParquetFile, np.ndarray]:
    """A work set and where each of its row groups ends; a task reads it twice a shard, and its footer only once."""
    file = pq.ParquetFile(path)
    groups = range(file.num_row_groups)
    return file, np.cumsum([file.metadata.row_group(group).num_rows for group in groups], dtype=np.int64)


def narrow_to(shards: Sequence[str], have: Sequence[str]) -> list[str]:
    """The shards of a pipeline that the table has, in the pipeline's order."""
    known = set(have)
    return [shard for shard in shards if shard in known]
