"""Write selection: the rows that write SQL returns, by shard, next to what the table says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import ConfigError
from builder.hybrid import edit as edited_sample
from builder.hybrid.edit import Rules
from builder.hybrid.image import MADE, POINTER, says_format
from builder.store.layout import Layout
from builder.table import partitions, schema
from builder.table.schema import Column, folded
from builder.table.sql_text import Sql, batches

ROW_KEYS = ("shard", "row", "uid")
_OTHER = ("dropped", "caption", "image_format")
_TYPES = {
    "shard": "varchar", "row": "bigint", "uid": "varchar", "dropped": "boolean", "caption": "varchar",
    "image_path": "varchar", "image_offset": "bigint", "image_size": "bigint", "image_width": "integer",
    "image_height": "integer", "image_sha256": "varchar", "image_seed": "bigint", "image_model": "varchar",
    "image_prompt": "varchar", "prompt": "varchar", "image_format": "varchar",
}  # fmt: skip
SET = "set_"
#: Words for types of SQL that json does not have, or that Arrow does not hold: it takes the largest UHUGEINT for -1.
_NOT_IN_JSON = ("INTERVAL", "MAP(", "UNION(", "UHUGEINT")
#: Between the extensions of a sample's members, none of which holds it.
BETWEEN = "/"


def _in_python(batch: pa.RecordBatch, sql: Sql) -> list[dict[str, Any]]:
    """The rows of a batch.

    Raises:
        ConfigError: a date or time that Python does not have, and json neither: infinity, years beyond 1 to 9999.
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
                        f"write SQL returned '{name}' of type {value.type} outside the years 1 to 9999 (as infinity), "
                        "which json does not have",
                        where={"file": sql.origin, **place},
                        fix=f"return null or text: cast({name} as varchar)",
                    ) from error
        raise


def known_name(name: str) -> str:
    """A column of the write SQL as the writer calls it: SQL does not tell the case of a name, json fields do."""
    lower = folded(name)
    if lower.startswith(SET):
        return SET + name[len(SET) :]
    return lower if lower in _TYPES else name


def cast_column(name: str) -> str:
    quoted = schema.quoted(name)
    return f"cast(w.{quoted} as {_TYPES[name]}) as {quoted}" if name in _TYPES else f"w.{quoted} as {quoted}"


def check_columns(returned: Sequence[str], types: Sequence[str], sql: Sql, rules: Rules) -> None:
    place = {"file": sql.origin, "returned": ", ".join(returned)}
    for name in ROW_KEYS:
        if name not in returned:
            raise ConfigError(f"write SQL returned no column '{name}'", where=place, fix="select shard, row, uid, ...")
    for name in returned:
        if name not in (*ROW_KEYS, *POINTER, *MADE, *_OTHER) and not name.startswith(SET):
            raise ConfigError(
                f"write SQL returned a column '{name}', which the writer does not know",
                where=place,
                fix=f"to set a json field write: {name} as {SET}{name}",
            )
    describing = edited_sample.DESCRIBING | {*rules.box_fields}
    owned = edited_sample.OWNED | (describing if "image_path" in returned else set())
    for name, kind in zip(returned, types, strict=True):
        if folded(name.removeprefix(SET)) in owned and name.startswith(SET):
            raise ConfigError(
                f"write SQL returned '{name}', which the writer sets itself",
                where=place,
                fix="leave it out" if folded(name) != f"{SET}caption" else "return the new caption as: caption",
            )
        if name.startswith(SET) and any(word in kind for word in _NOT_IN_JSON):
            raise ConfigError(
                f"write SQL returned '{name}' of type {kind}, which json does not have",
                where=place,
                fix=f"cast it, for example: cast({name} as varchar)",
            )
    if "image_path" in returned and "caption" in returned:
        raise ConfigError(
            "write SQL returned both 'image_path' and 'caption'",
            where=place,
            fix="the caption of a new image is its image_prompt: leave caption out",
        )
    needed = (*POINTER, "image_prompt", "prompt", "image_width", "image_height", "image_sha256")
    if "image_path" in returned and (missing := [name for name in needed if name not in returned]):
        raise ConfigError(
            f"write SQL returned 'image_path' without '{missing[0]}'",
            where=place,
            fix=f"image and caption belong together; select all of: {', '.join(needed)}",
        )


def columns_beside(columns: Sequence[Column], stage: str | None, returned: Sequence[str]) -> dict[str, str]:
    """What the plan wants to know of a row beside what the SQL returns, and the column that says it."""
    beside = {"source_status": "source_status", "source_extensions": "source_members.list.element.ext"}
    if stage and "image_path" in returned:
        beside["image_run"] = f"{stage}_run"
        if says_format(columns):
            beside["image_format"] = "image_format"
    return {name: column for name, column in beside.items() if name not in returned}


def with_table(
    layout: Layout, shard: str, rows: list[dict[str, Any]], columns: dict[str, str]
) -> tuple[list[dict[str, Any]], partitions.State]:
    """The rows of the write SQL that the table has, with what `columns` say of them."""
    have, state = partitions.read_partition(layout, shard, list(columns.values()))
    known = [row for row in rows if row["row"] is not None and 0 <= row["row"] < have.num_rows]
    at = pa.array([row["row"] for row in known], pa.int64())
    found = {name: _texts(have[column].take(at)) for name, column in columns.items()}
    return [
        {**row, **dict(zip(found, values, strict=True))} for row, *values in zip(known, *found.values(), strict=True)
    ], state


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    """A column of text; of one with the members of samples the extensions of each."""
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    members = column.combine_chunks()
    lists = pa.ListArray.from_arrays(members.offsets, members.values.field("ext"))
    return list(pc.binary_join(lists, BETWEEN).to_pylist())


def by_shard(reader: pa.RecordBatchReader, sql: Sql) -> Iterator[tuple[str, list[dict[str, Any]]]]:
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
