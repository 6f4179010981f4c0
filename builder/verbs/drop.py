"""The verb `drop`: a column leaves the table."""

from __future__ import annotations

from builder.errors import ConfigError
from builder.table import root_schema, schema
from builder.verbs.pipeline import Pipeline


def drop_column(pipeline: Pipeline, name: str) -> None:
    """Takes one column out of the table.

    Raises:
        ConfigError: the table has no such column, or needs it.
    """
    layout = pipeline.layout
    layout.check_folders()
    _, columns = root_schema.load_schema(layout)
    alike = [column for column in columns if schema.folded(column.name) == schema.folded(name)]
    column = next((column for column in alike if column.name == name), alike[0] if len(alike) == 1 else None)
    if column is None:
        raise ConfigError(
            f"the table has no column '{name}'", where={"root": layout.root}, fix="builder sql 'describe samples'"
        )
    needed = {c.name for stage in {c.stage for c in columns} for c in schema.status_columns(stage)}
    if column in schema.IDENTITY or column.name in needed:
        raise ConfigError(
            f"column '{name}' cannot be dropped",
            where={"stage": column.stage},
            fix="drop an output of a stage or a json field",
        )
    root_schema.change_schema(layout, lambda have: tuple(c for c in have if c.name != column.name))
