"""Work sets: evaluate a stage's SQL once, keep the rows to do, freeze them, cut them into tasks.

Owns `runs/<run>/workset.parquet` and `tasks/`. The table is the only book of what is done; a work set only says what
one run will try.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builder import files, query, schema
from builder.errors import ConfigError, ConflictError, where
from builder.layout import Layout, RunFiles
from builder.query import Samples, Sql
from builder.schema import Column
from builder.stage import Stage, inputs_hashes
from builder.table import partition_state

#: Rows of one read from DuckDB, and of one row group of the work set.
_CHUNK = 20_000
_KEYS = ("shard", "row", "uid")
#: How often a freeze is tried while shards are being ingested beside it.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Choice:
    """Which of the rows that the SQL covers a run tries; rows without an answer always.

    Attributes:
        retry: failed rows too: `failed` for all, else the class of the error.
        redo: rows with an answer too.
        stale: rows whose inputs, stage version or options differ from those of their answer.
        where: a condition over `samples` that narrows any of these.
    """

    retry: str | None = None
    redo: bool = False
    stale: bool = False
    where: str | None = None

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("retry", "redo", "stale") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} say different things",
                fix="give one: --retry failed rows, --redo all rows, --stale rows whose inputs or options changed",
            )


@dataclass(frozen=True)
class Slice:
    """Rows of one shard in a work set.

    Attributes:
        first: position of the first row in `workset.parquet`.
        rows: identity of the shard's rows that the positions follow.
    """

    shard: str
    first: int
    count: int
    rows: str


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
    """

    covered: int
    todo: int
    ok: int
    failed: int
    outside: int
    shards: int


@dataclass(frozen=True)
class Work:
    """The work of one stage: its SQL, parameters and choice, over certain shards.

    Attributes:
        columns: the root's columns with the stage's own.
        signature: `stage.options_hash`, half of every row's inputs hash.
    """

    kind: type[Stage]
    sql: Sql
    params: dict[str, Any]
    choice: Choice
    shards: Sequence[str]
    columns: Sequence[Column]
    signature: str


def count(layout: Layout, work: Work) -> Counts:
    """Counts the rows of a stage's work; starts nothing."""
    name = work.kind.name
    with Samples(layout, work.columns, work.shards) as samples:
        _check_columns(samples, work)
        around = (
            f"select count(*), count(*) filter ({name}_status = 'ok'), count(*) filter ({name}_status = 'failed'),"
            f" count(*) filter ({_selected(work)}), count(distinct shard) filter ({_selected(work)})"
            f" from (select s.* from {{}} w join {_narrowed(work)} s on w.shard = s.shard and w.row = s.row"
            f" where s.source_status = 'ok')"
        )
        covered, ok, failed, todo, shards = samples.rows(work.sql, work.params, around=around)[0]
        answered = samples.fixed(
            f"select count(*) from {_narrowed(work)} s where {name}_status = 'ok' and source_status = 'ok'"
        )[0][0]
    if work.choice.stale and todo:
        todo, shards = _count_stale(layout, work)
    return Counts(covered, todo, ok, failed, answered - ok, shards)


def _count_stale(layout: Layout, work: Work) -> tuple[int, int]:
    rows, shards = 0, set()
    with Samples(layout, work.columns, work.shards) as samples:
        for chunk in _chunks(samples, work):
            rows += chunk.num_rows
            shards.update(chunk["shard"].unique().to_pylist())
    return rows, len(shards)


def freeze(layout: Layout, run: RunFiles, work: Work) -> list[Slice]:
    """Evaluates the SQL once and writes the rows to try, sorted by shard and row.

    Raises:
        ConfigError: the SQL returns other columns than the stage needs, or a row twice.
        ConflictError: shards were ingested again all the while.
    """
    for _ in range(_ATTEMPTS):
        before: dict[str, str] = {}
        slices: list[Slice] = []
        run.folder.mkdir(parents=True, exist_ok=True)
        temp = files.temp_path(run.workset)
        try:
            with Samples(layout, work.columns, work.shards) as samples:
                _check_columns(samples, work)
                before = {shard: _rows_of(layout, shard) for shard in work.shards}
                with where(file=work.sql.origin):
                    _write(_chunks(samples, work), temp, slices, before)
            if all(_rows_of(layout, part.shard) == part.rows for part in slices):
                files.write_atomic(run.workset, temp.replace)
                return slices
        finally:
            temp.unlink(missing_ok=True)
    raise ConflictError("shards were ingested again while the work set was frozen", fix="run the same command again")


def _rows_of(layout: Layout, shard: str) -> str:
    state = partition_state(layout, shard)
    return "" if state is None else state.rows


def _write(chunks: Iterator[pa.Table], path: Path, slices: list[Slice], rows: dict[str, str]) -> None:
    writer: pq.ParquetWriter | None = None
    position, previous = 0, None
    try:
        for chunk in chunks:
            previous = _refuse_doubles(chunk, previous)
            counted = chunk["shard"].combine_chunks().dictionary_encode()
            for shard, number in _runs(counted):
                if slices and slices[-1].shard == shard:
                    slices[-1] = Slice(shard, slices[-1].first, slices[-1].count + number, rows[shard])
                else:
                    slices.append(Slice(shard, position, number, rows[shard]))
                position += number
            if writer is None:
                writer = pq.ParquetWriter(path, chunk.schema, compression="zstd", compression_level=1)
            writer.write_table(chunk, row_group_size=_CHUNK)
    finally:
        if writer is not None:
            writer.close()
        else:
            path.touch()


def _runs(column: pa.DictionaryArray) -> list[tuple[str, int]]:
    counts = pc.value_counts(column.indices).to_pylist()
    return [(column.dictionary[item["values"]].as_py(), item["counts"]) for item in counts]


def _refuse_doubles(chunk: pa.Table, previous: tuple[str, int] | None) -> tuple[str, int] | None:
    shard, row = chunk["shard"].to_pylist(), chunk["row"].to_pylist()
    for here in zip(shard, row, strict=True):
        if here == previous:
            raise ConfigError(
                f"work SQL returns row {here[1]} of shard '{here[0]}' more than once",
                fix="each sample once: select distinct on (shard, row), or aggregate the join that repeats it",
            )
        previous = here
    return previous


def _chunks(samples: Samples, work: Work) -> Iterator[pa.Table]:
    """The rows to try in order of shard and row, with `previous_run` and `inputs`."""
    name = work.kind.name
    wanted = "".join(
        f', cast(w."{field.name}" as {schema.duckdb_type(field.type)}) as "{field.name}"' for field in work.kind.inputs
    )
    around = (
        f'select s.shard as shard, s.row as "row", s.uid as uid{wanted}, s.{name}_run as previous_run,'
        f" s.{name}_inputs as previous_inputs{_bytes_of(work.kind)}"
        f" from {{}} w join {_narrowed(work)} s on w.shard = s.shard and w.row = s.row"
        f" where s.source_status = 'ok' and ({_selected(work, 's.')}) order by 1, 2"
    )
    relation = samples.select(work.sql, work.params, around=around)
    try:
        for batch in relation.to_arrow_reader(_CHUNK):
            table = _with_inputs(pa.Table.from_batches([batch]), work)
            if table.num_rows:
                yield table
    except duckdb.Error as error:
        raise query.guarded(work.sql, error) from error


def _bytes_of(kind: type[Stage]) -> str:
    """What identifies the bytes that a stage reads: extension and size of source members, sha256 of generated ones."""
    parts = []
    if set(kind.members) - {"edit"}:
        parts.append("list_transform(s.source_members, lambda m: m.ext || ' ' || m.size)::varchar as member_bytes")
    if "edit" in kind.members:
        parts.append("s.image_sha256 as edit_bytes")
    return "".join(", " + part for part in parts)


def _with_inputs(table: pa.Table, work: Work) -> pa.Table:
    keys = [field.name for field in work.kind.inputs]
    hashed = [name for name in (*keys, "member_bytes", "edit_bytes") if name in table.column_names]
    columns = [table[name].to_pylist() for name in hashed] or [[None] * table.num_rows]
    inputs = inputs_hashes(work.signature, columns)
    fields = [*_KEYS, *keys, "previous_run"]
    result = table.select(fields).append_column("inputs", inputs)
    result = result.set_column(1, "row", result["row"].cast(pa.int64()))
    for field in work.kind.inputs:
        at = result.column_names.index(field.name)
        result = result.set_column(at, field.name, result[field.name].cast(field.type))
    if work.choice.stale:
        changed = pc.not_equal(table["previous_inputs"].cast(pa.uint64()), inputs)
        result = result.filter(pc.fill_null(pc.or_(changed, pc.is_null(table["previous_inputs"])), True))
    return result


def _selected(work: Work, table: str = "") -> str:
    """The SQL condition for the rows that a choice tries; staleness is judged when their inputs are known."""
    name, choice = work.kind.name, work.choice
    status = f"{table}{name}_status"
    if choice.redo or choice.stale:
        return "true"
    if choice.retry == "failed":
        return f"{status} is null or {status} = 'failed'"
    if choice.retry:
        kind = choice.retry.replace("'", "''")
        return f"{status} is null or ({status} = 'failed' and starts_with({table}{name}_error, '{kind}:'))"
    return f"{status} is null"


def _narrowed(work: Work) -> str:
    if not work.choice.where:
        return "samples"
    return f"({_where(work.choice.where).text})"


def _where(condition: str) -> Sql:
    return Sql(f"select * from samples where (\n{condition}\n)", "--where")


def _check_columns(samples: Samples, work: Work) -> None:
    """Refuses SQL that does not return exactly what the stage needs, and a condition that is none."""
    if work.choice.where:
        samples.select(_where(work.choice.where))
    returned = samples.select(work.sql, work.params).columns
    wanted = [*_KEYS, *(field.name for field in work.kind.inputs)]
    place = {"file": work.sql.origin, "returned": ", ".join(returned)}
    for name in wanted:
        if name not in returned:
            have = {column.name for column in work.columns}
            given = [name if name in have else f"caption as {name}" for name in wanted]
            raise ConfigError(
                f"work SQL returned no column '{name}', which stage '{work.kind.name}' needs",
                where=place,
                fix=f"add it, for example: select {', '.join(given)}",
            )
    extra = [name for name in returned if name not in wanted]
    if extra:
        raise ConfigError(
            f"work SQL returned a column '{extra[0]}', which stage '{work.kind.name}' does not take",
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
    """The rows of one shard: shard, row, uid, the stage's inputs, previous_run, inputs."""
    with pq.ParquetFile(run.workset) as file:
        groups: list[int] = []
        first = position = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if position + rows > part.first and position < part.first + part.count:
                if not groups:
                    first = position
                groups.append(group)
            position += rows
        table = file.read_row_groups(groups)
    return table.slice(part.first - first, part.count)


def narrow_to(shards: Sequence[str], have: Sequence[str]) -> list[str]:
    """The shards of a pipeline that the table has, in the pipeline's order."""
    known = set(have)
    return [shard for shard in shards if shard in known]
