"""Commits: the rows read by ingest or answered by a task become the next generation of a column file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import ConflictError, where
from builder.store import files
from builder.store.layout import Layout, generation_of
from builder.table.column_files import (
    Content,
    aligned,
    column_values,
    commit_file,
    listing,
    newest,
    read_column_file,
    rows_hash,
)
from builder.table.origin import Origin
from builder.table.partitions import fold
from builder.table.schema import SOURCE, Column


@dataclass
class Committed:
    """What happened to the rows of one commit.

    Attributes:
        rows: how many rows were committed.
        dropped: how many rows another run or another copy of the task had answered since the freeze.
        kept: failures that did not replace an `ok` answer.
    """

    rows: int = 0
    dropped: int = 0
    kept: list[int] = field(default_factory=list)


class Swept(ConflictError):
    """A sweep has deleted files of this attempt: it commits nothing and starts again under a new name."""


def earlier_sources(layout: Layout, shard: str) -> list[Path]:
    """The column files that ingest has committed for a shard, the newest first."""
    generations = listing(layout, shard, fresh=True).get(SOURCE, [])
    return [layout.column_file(shard, SOURCE, generation) for generation in reversed(generations)]


def commit_source(layout: Layout, shard: str, source: Origin, follow: Callable[[Sequence[Path]], pa.Table]) -> None:
    """Commits the rows that ingest read from a shard, and folds it.

    Args:
        follow: makes the rows to commit from the column files that ingest committed before, the newest first; called
            again if another ingest commits meanwhile.
    """
    while True:
        earlier = earlier_sources(layout, shard)
        table = files.retry_listing(partial(follow, earlier))
        keys = table["key"].to_pylist()
        rows = _rows_that_stay(earlier, keys) or rows_hash(keys)
        generation = _number_of(earlier[0]) + 1 if earlier else 1
        content = Content(table, rows, source=source)
        if commit_file(layout, shard, SOURCE, generation, content):
            return fold(layout, shard, known=(SOURCE, generation, content))


def _rows_that_stay(earlier: Sequence[Path], keys: list[str]) -> str | None:
    """The identity of the committed rows, if they have these keys in this order."""
    if not earlier:
        return None
    newest_file = read_column_file(earlier[0], ["key"])
    return newest_file.rows if newest_file.table["key"].to_pylist() == keys else None


def _number_of(column_file: Path) -> int:
    parsed = generation_of(column_file.name)
    assert parsed is not None
    return parsed[1]


def commit(
    layout: Layout,
    shard: str,
    stage: str,
    columns: tuple[Column, ...],
    done: pa.Table,
    previous: Sequence[str | None],
    *,
    rows: str,
    attempt: str,
) -> Committed:
    """Commits rows that a task has done in a new generation, except rows answered by another run since the freeze.

    Args:
        columns: the stage's columns, including its status columns.
        done: the rows: `row` and every column of `columns`.
        previous: `<stage>_run` of each row at the time of the freeze.
        rows: identity of the shard's rows that the work set was made for.
        attempt: name of this attempt, compared with those that a sweep has recorded.

    Raises:
        ConflictError: the shard was ingested again with other rows.
        Swept: a sweep has recorded this attempt.
    """
    made: Committed | None = None
    with where(stage=stage, shard=shard):
        while True:
            generation, base = files.retry_listing(partial(_base, layout, shard, stage, columns, rows))
            if attempt in base.swept:
                raise Swept(f"attempt '{attempt}' was swept: it starts again", fix="nothing to do")
            result, table = _applied(stage, base.table, done, previous)
            if result.rows == 0:
                return made or result
            if not commit_file(layout, shard, stage, generation + 1, replace(base, table=table)):
                continue
            made = result
            if newest(layout, shard, fresh=True).get(stage, 0) == generation + 1:
                return result


def _base(layout: Layout, shard: str, stage: str, columns: tuple[Column, ...], rows: str) -> tuple[int, Content]:
    """The newest generation of a stage (0 if there is none yet) and its answers, aligned with the shard's rows."""
    found = listing(layout, shard, fresh=True)
    source = read_column_file(layout.column_file(shard, SOURCE, found[SOURCE][-1]), ["key"])
    if source.rows != rows:
        raise ConflictError(
            "the shard was ingested again with other rows since this work was planned",
            where={"rows": f"expected {rows}, found {source.rows}"},
            fix="run the same command again: it plans the work again",
        )
    generation = found.get(stage, [0])[-1]
    content = Content(pa.table({}), rows)
    if generation:
        newest_file = read_column_file(layout.column_file(shard, stage, generation))
        content = aligned(layout, shard, stage, newest_file, found, source)
    merged = {name: content.table[name] for name in content.table.column_names}
    count = source.table.num_rows + len(content.gone)
    merged |= {column.name: column_values(content.table, column, count) for column in columns}
    return generation, replace(content, table=pa.table(merged))


def _applied(stage: str, base: pa.Table, done: pa.Table, previous: Sequence[str | None]) -> tuple[Committed, pa.Table]:
    """Puts rows of `done` into `base` if their run is still the previous one and no failure replaces an answer."""
    at = done["row"].to_numpy()
    runs = base[f"{stage}_run"].take(pa.array(at)).to_pylist()
    status = base[f"{stage}_status"].take(pa.array(at)).to_pylist()
    failed = pc.equal(done[f"{stage}_status"], "failed").to_pylist()
    take: list[int] = []
    result = Committed()
    for i, (run, expected, old, fails) in enumerate(zip(runs, previous, status, failed, strict=True)):
        if run != expected:
            result.dropped += 1
        elif fails and old == "ok":
            result.kept.append(int(at[i]))
        else:
            take.append(i)
    result.rows = len(take)
    if not take:
        return result, base
    chosen = done.take(pa.array(take))
    indices = np.arange(base.num_rows)
    indices[at[take]] = base.num_rows + np.arange(len(take))
    merged = {}
    for name in base.column_names:
        new = chosen[name] if name in chosen.column_names else pa.nulls(len(take), base[name].type)
        both = pa.chunked_array([*_chunks(base[name]), *_chunks(new)], base[name].type)
        merged[name] = both.take(pa.array(indices))
    return result, pa.table(merged)


def _chunks(column: pa.ChunkedArray | pa.Array) -> list[pa.Array]:
    return list(column.chunks) if isinstance(column, pa.ChunkedArray) else [column]
