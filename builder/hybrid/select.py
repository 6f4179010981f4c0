"""Write selection: the rows that write SQL returns, shard by shard, with columns of the table.

The writer and all exports read their rows from here. It reads no tars and decides nothing about the edits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from builder import machine
from builder.errors import BuilderError, ConfigError
from builder.hybrid import image
from builder.store.layout import Layout
from builder.table import partitions, schema
from builder.table.query import Samples
from builder.table.schema import Column, folded
from builder.table.sql_text import DuckError, Sql, batches, guarded, repeats_a_row

#: Columns that write SQL must return.
_KEYS = ("shard", "row", "uid")
#: Columns that it can return, with their types in SQL. All others begin with `SET`.
_TYPES = {
    "shard": "varchar", "row": "bigint", "uid": "varchar", "dropped": "boolean", "caption": "varchar", **image.SQL_TYPES
}  # fmt: skip
#: A column `set_<name>` sets the json field `<name>`.
SET = "set_"
#: json fields that no column can set: always, and if the SQL returns images, which they describe.
_OWNED = frozenset({"caption", "original_caption", "provenance"})
_DESCRIBING = frozenset({"width", "height", "original_width", "original_height", "sha256"})
#: Types of SQL that json cannot hold, and UHUGEINT, whose largest value becomes -1 in Arrow.
_NOT_IN_JSON = ("INTERVAL", "MAP(", "UNION(", "UHUGEINT")
#: Separates the extensions of a sample's members; no extension contains it.
_BETWEEN = "/"
#: Rows that are read at a time.
_BATCH = 10_000


@dataclass(frozen=True)
class Selection:
    """The selected samples of one shard.

    Attributes:
        state: the shard's source, and the identity of its rows.
        rows: one dict per sample, ascending by `row`, each row once; empty if the SQL returns none. Each has
            `shard` (str), `row` (int, position in the shard from 0), `uid` (str), and those of these that the SQL
            returns:
            `dropped` (bool), `caption` (str), the columns of an image (`image.SQL_TYPES`; offset and size in bytes,
            width and height in pixels), `set_<json field>` (any value that json can hold). From the table come
            `source_status` (`ok`, or `failed` for a sample with a bad source), `source_extensions` (see
            `extensions_of`) and, with images, `image_run` (the run that made it) and `image_format`. Null is None.
        row_schema: the Arrow schema of the rows, the same for all shards.
    """

    shard: str
    state: partitions.State
    rows: list[dict[str, Any]]
    row_schema: pa.Schema


def select(
    layout: Layout,
    columns: Sequence[Column],
    shards: Sequence[str],
    sql: Sql,
    params: dict[str, Any],
    *,
    boxes: Collection[str] = (),
    refused: dict[str, BuilderError] | None = None,
    state: Callable[[str], partitions.State | None] | None = None,
) -> Iterator[Selection]:
    """Evaluates write SQL once and yields one Selection per shard that is in the table, sorted by name.

    A shard without selected rows is yielded too.

    Args:
        columns: of the table.
        boxes: json fields that hold boxes of a sample's picture; SQL that returns images cannot set them.
        refused: collects shards without a selection, and why; if None, the first such error is raised.
        state: returns the state of a partition that the caller already knows, so that it is not read again.

    Raises:
        ConfigError: the SQL is refused, returns an unknown column, or returns a row twice.
    """
    state_of = state or partial(partitions.partition_state, layout)
    with Samples(layout, columns, shards, deciding=[sql]) as samples:
        found = samples.columns(sql, params)
        returned = [_known_name(name) for name in found]
        _check_columns(returned, list(found.values()), sql, boxes)
        chosen = ", ".join(_cast(name) for name in returned)
        around = f"select {chosen} from {{}} w order by w.shard, w.row"
        more = _columns_of_table(columns, returned)
        try:
            reader = samples.select(sql, params, around=around).to_arrow_reader(_BATCH)
            row_schema = pa.schema([*reader.schema, *((name, pa.string()) for name in more)])
            by_shard = _by_shard(reader, sql)
            waiting = next(by_shard, None)
            for shard in sorted(shards):
                known = state_of(shard)
                if known is None:
                    continue
                while waiting is not None and waiting[0] < shard:
                    waiting = next(by_shard, None)  # of a shard that is not in the table
                rows: list[dict[str, Any]] = []
                try:
                    if waiting is not None and waiting[0] == shard:
                        rows, known = _with_table(layout, shard, waiting[1], more)
                        waiting = next(by_shard, None)
                    _check_once(shard, rows, sql)
                except Exception as error:
                    note_refused(refused, shard, error)
                    continue
                yield Selection(shard, known, rows, row_schema)
        except DuckError as error:
            raise guarded(sql, error) from error


def note_refused(refused: dict[str, BuilderError] | None, shard: str, error: Exception) -> None:
    """Records a refused shard; raises if there is nowhere to record it, or the error is not about the shard."""
    if refused is None or not (isinstance(error, BuilderError) or machine.is_of_the_machine(error)):
        raise error
    refused[shard] = error if isinstance(error, BuilderError) else machine.explained(error)


def extensions_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The extensions of a selected sample's members, in their order in the source; empty if it has none."""
    joined = row["source_extensions"]
    return tuple(joined.split(_BETWEEN)) if joined else ()


def _check_once(shard: str, rows: list[dict[str, Any]], sql: Sql) -> None:
    for before, row in pairwise(rows):
        if before["row"] == row["row"]:
            raise repeats_a_row("write SQL", sql, shard, row["row"])


def _in_python(batch: pa.RecordBatch, sql: Sql) -> list[dict[str, Any]]:
    """The rows of a batch.

    Raises:
        ConfigError: a date or time that neither Python nor json can hold: infinity, or a year outside 1 to 9999.
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except (OverflowError, ValueError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for i, value in enumerate(column):
                try:
                    value.as_py()
                except (OverflowError, ValueError) as error:
                    place = {key: batch.column(key)[i].as_py() for key in ("shard", "row")}
                    raise ConfigError(
                        f"write SQL returned '{name}' of type {value.type} outside the years 1 to 9999 (or infinity), "
                        "which json does not have",
                        where={"file": sql.origin, **place},
                        fix=f"return null or text: cast({name} as varchar)",
                    ) from error
        raise


def _known_name(name: str) -> str:
    """The name of a column of the SQL here: SQL ignores case, json fields do not."""
    lower = folded(name)
    if lower.startswith(SET):
        return SET + name[len(SET) :]
    return lower if lower in _TYPES else name


def _cast(name: str) -> str:
    quoted = schema.quoted(name)
    if name in _TYPES:
        return f"cast(w.{quoted} as {_TYPES[name]}) as {quoted}"
    return f"w.{quoted} as {quoted}"


def _check_columns(returned: Sequence[str], types: Sequence[str], sql: Sql, boxes: Collection[str]) -> None:
    place = {"file": sql.origin, "returned": ", ".join(returned)}
    for name in _KEYS:
        if name not in returned:
            raise ConfigError(f"write SQL returned no column '{name}'", where=place, fix="select shard, row, uid, ...")
    for name in returned:
        if name not in _TYPES and not name.startswith(SET):
            raise ConfigError(
                f"write SQL returned a column '{name}', which the writer does not know",
                where=place,
                fix=f"to set a json field, write: {name} as {SET}{name}",
            )
    owned = {*_OWNED, *_DESCRIBING, *boxes} if "image_path" in returned else _OWNED
    for name, kind in zip(returned, types, strict=True):
        if not name.startswith(SET):
            continue
        if folded(name.removeprefix(SET)) in owned:
            is_caption = folded(name) == f"{SET}caption"
            raise ConfigError(
                f"write SQL returned '{name}', which the writer sets itself",
                where=place,
                fix="return the new caption as: caption" if is_caption else "leave it out",
            )
        if any(word in kind for word in _NOT_IN_JSON):
            raise ConfigError(
                f"write SQL returned '{name}' of type {kind}, which json does not have",
                where=place,
                fix=f"cast it, for example: cast({name} as varchar)",
            )
    if "image_path" in returned:
        _check_image_columns(returned, place)


def _check_image_columns(returned: Sequence[str], place: dict[str, str]) -> None:
    if "caption" in returned:
        raise ConfigError(
            "write SQL returned both 'image_path' and 'caption'",
            where=place,
            fix="the caption of a new image is its image_prompt: leave caption out",
        )
    for name in image.NEEDED:
        if name not in returned:
            raise ConfigError(
                f"write SQL returned 'image_path' without '{name}'",
                where=place,
                fix=f"select all of: {', '.join(image.NEEDED)}",
            )


def _columns_of_table(columns: Sequence[Column], returned: Sequence[str]) -> dict[str, str]:
    """Table columns that a selection has, by their name in the selection."""
    found = {"source_status": "source_status", "source_extensions": "source_members.list.element.ext"}
    if "image_path" in returned:
        found |= image.table_columns(columns)
    return {name: column for name, column in found.items() if name not in returned}


def _with_table(
    layout: Layout, shard: str, rows: list[dict[str, Any]], columns: dict[str, str]
) -> tuple[list[dict[str, Any]], partitions.State]:
    """Those rows of the SQL that are in the table, with `columns` of the table."""
    have, state = partitions.read_partition(layout, shard, list(columns.values()))
    known = [row for row in rows if row["row"] is not None and 0 <= row["row"] < have.num_rows]
    at = pa.array([row["row"] for row in known], pa.int64())
    found = {name: _texts(have[column].take(at)) for name, column in columns.items()}
    values = zip(*found.values(), strict=True)
    return [{**row, **dict(zip(found, more, strict=True))} for row, more in zip(known, values, strict=True)], state


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    """The values of a column of text; for the column of members, the extensions of each sample."""
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    members = column.combine_chunks()
    lists = pa.ListArray.from_arrays(members.offsets, members.values.field("ext"))
    return list(pc.binary_join(lists, _BETWEEN).to_pylist())


def _by_shard(reader: pa.RecordBatchReader, sql: Sql) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """One list of rows per shard."""
    shard: str | None = None
    rows: list[dict[str, Any]] = []
    for batch in batches(reader):
        for row in _in_python(batch, sql):
            if row["shard"] != shard:
                if shard is not None:
                    yield shard, rows
                shard, rows = row["shard"], []
            rows.append(row)
    if shard is not None:
        yield shard, rows
