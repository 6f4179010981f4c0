"""The verb `sql`: questions over the whole table."""

from __future__ import annotations

from typing import Any

from builder.table.query import Samples
from builder.table.sql_text import Sql
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot


def all_samples(pipeline: Pipeline) -> Samples:
    """The whole table of the root, for questions."""
    return Samples(pipeline.layout, Snapshot(pipeline).known_columns, pipeline.layout.partitions())


def answer(pipeline: Pipeline, sql: Sql, params: dict[str, Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Answers a question over the whole table: names and rows."""
    with all_samples(pipeline) as samples:
        relation = samples.select(sql, params)
        return list(relation.columns), samples.rows(sql, params)
