"""The columns of a root, stored as generations of its schema, each created once."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from builder.errors import SchemaError, ShardError
from builder.store import files
from builder.store.layout import Layout, generation_of, names
from builder.table import schema
from builder.table.column_files import renew_listing
from builder.table.schema import Column

# --- schema ---


def load_schema(layout: Layout, *, fresh: bool = False) -> tuple[int, tuple[Column, ...]]:
    """The newest generation of the root's columns; (0, ()) for a new root.

    Args:
        fresh: renews a cached listing first.
    """

    def read() -> tuple[int, tuple[Column, ...]]:
        if fresh:
            renew_listing(layout.schema)
        generation = max((found[1] for name in names(layout.schema) if (found := generation_of(name))), default=0)
        if generation == 0:
            return 0, ()
        return generation, read_schema(layout.schema_file(generation))

    return files.retry_listing(read)


def read_schema(path: Path) -> tuple[Column, ...]:
    text = path.read_text("utf-8")
    try:
        return tuple(Column.from_json(item) for item in json.loads(text)["columns"])
    except (ValueError, KeyError, TypeError, SchemaError) as error:
        raise ShardError(
            "the root's schema was not written by builder",
            where={"file": path, "reason": error.what if isinstance(error, SchemaError) else error},
            fix=f"rm {shlex.quote(str(path))}: the generation before it counts",
        ) from error


def change_schema(layout: Layout, change: Callable[[tuple[Column, ...]], tuple[Column, ...]]) -> tuple[Column, ...]:
    """Commits a new generation of the root's columns, unless `change` returns them unchanged."""
    while True:
        generation, have = load_schema(layout, fresh=True)
        changed = change(have)
        if changed == have:
            return have
        text = json.dumps({"columns": schema.describe(changed)}, indent=1)
        if files.create_only(layout.schema_file(generation + 1), text.encode()):
            return changed


def extend_schema(layout: Layout, columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """Adds a stage's columns to the root before the stage runs. Raises SchemaError as `schema.merge` does."""
    return change_schema(layout, partial(_merged, new=columns))


def _merged(have: tuple[Column, ...], new: tuple[Column, ...]) -> tuple[Column, ...]:
    return schema.merge(have, new)
