"""Finds the columns that point into edits tars."""

from __future__ import annotations

from collections.abc import Iterable

from builder.table import schema


def pointers_of(columns: Iterable[schema.Column]) -> dict[str, list[str]]:
    """The columns of each stage that name edits tars: those with columns for offset, size and sha256 next to them."""
    names = {column.name for column in columns}
    found: dict[str, list[str]] = {}
    for column in columns:
        base = column.name.removesuffix("_path")
        if base != column.name and {f"{base}_offset", f"{base}_size", f"{base}_sha256"} <= names:
            found.setdefault(column.stage, []).append(column.name)
    return found
