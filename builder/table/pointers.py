"""Which columns point into edits tars."""

from __future__ import annotations

from collections.abc import Iterable

from builder.table import schema


def pointers_of(columns: Iterable[schema.Column]) -> dict[str, list[str]]:
    """For each stage of a root its columns that name edits tars: those with offset, size and sha256 beside them."""
    names = {column.name for column in columns}
    found: dict[str, list[str]] = {}
    for column in columns:
        base = column.name.removesuffix("_path")
        if base != column.name and {f"{base}_offset", f"{base}_size", f"{base}_sha256"} <= names:
            found.setdefault(column.stage, []).append(column.name)
    return found
