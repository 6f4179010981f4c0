"""Finds the columns that point into edits tars."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from builder.table import schema


def pointers_in(columns: pa.Schema) -> list[str]:
    """The columns of one stage that name edits tars: text, with columns for offset and size next to them.

    Whatever looks like a pointer keeps its tar, so the columns of `builder.table.outputs.Bytes` that describe the
    content may be missing: they can be dropped.
    """
    names = {*columns.names}
    found = []
    for column in columns:
        base = column.name.removesuffix("_path")
        if base != column.name and column.type == pa.string() and {f"{base}_offset", f"{base}_size"} <= names:
            found.append(column.name)
    return found


def pointers_of(columns: Iterable[schema.Column]) -> dict[str, list[str]]:
    """The columns of each stage that name edits tars, of those stages that have any."""
    by_stage: dict[str, list[schema.Column]] = {}
    for column in columns:
        by_stage.setdefault(column.stage, []).append(column)
    found = {stage: pointers_in(schema.arrow_schema(own)) for stage, own in by_stage.items()}
    return {stage: names for stage, names in found.items() if names}
