"""Work sets: evaluates a stage's SQL once, writes the rows to do to a file, and divides them into tasks.

Owns `runs/<run>/workset.parquet` and `tasks/`. Only the table records what is done; a work set only lists the rows that
one run will try."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builder.engine import outdated
from builder.engine.coverage import check_columns, in_one_pass_or_two, rows_covered, rows_of
from builder.engine.states import READ_ROWS, is_tried
from builder.engine.work import ROW_KEYS, WORK_COLUMNS, Work
from builder.errors import ConflictError
from builder.stages.contract import formats_asked
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table.query import Samples
from builder.table.rowwise import Rowwise

#: How often a freeze is tried while shards are ingested at the same time.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Slice:
    """Rows of one shard in a work set.

    Attributes:
        first: position of the first row in `workset.parquet`.
        rows: identity of the shard's rows that the positions follow.
        again: how many of the rows have an answer that is out of date.
    """

    shard: str
    first: int
    count: int
    rows: str
    again: int = 0


@contextlib.contextmanager
def unnamed(layout: Layout) -> Iterator[Path]:
    """Where rows are frozen while their run has no name yet: a temp file, which is deleted at the end.

    Move it into its run before that: `files.write_atomic(run.workset, path.replace)`.
    """
    files.make_folder(layout.runs)
    path = files.temp_path(layout.unnamed_workset)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def freeze(layout: Layout, path: Path, work: Work) -> list[Slice]:
    """Evaluates the SQL once and writes the rows to try to a file, sorted by shard and row.

    Raises:
        ConfigError: the SQL returns other columns than the stage needs, or a row twice.
        ConflictError: shards were ingested again during every try.
    """
    files.make_folder(path.parent)
    for _ in range(_ATTEMPTS):
        with Samples(layout, work.columns, sorted(work.shards), work.lookups, deciding=[work.sql]) as samples:
            check_columns(samples, work)
            before = {shard: rows_of(layout, shard) for shard in work.shards}
            slices = in_one_pass_or_two(work, partial(_frozen_to, layout, path, samples, work, before))
        if all(rows_of(layout, part.shard) == part.rows for part in slices):
            return slices
    raise ConflictError("shards were ingested again while the work set was frozen", fix="run the same command again")


def first_rows(layout: Layout, work: Work, count: int, *, repeatable: bool = True) -> pa.Table:
    """The first rows that a freeze would write; writes nothing.

    Args:
        repeatable: whether to refuse SQL whose result depends on the machine, as a freeze does.
    """
    deciding = [work.sql] if repeatable else []
    with Samples(layout, work.columns, sorted(work.shards), work.lookups, deciding=deciding) as samples:
        check_columns(samples, work)

        def read(taken: Rowwise | None, sort: set[str]) -> list[pa.Table]:
            parts: list[pa.Table] = []
            for part, _ in _frozen(layout, samples, work, taken, sort):
                parts.append(part)
                if sum(table.num_rows for table in parts) >= count:
                    break
            return parts

        parts = in_one_pass_or_two(work, read)
    return pa.concat_tables(parts).slice(0, count) if parts else pa.table({})


def _frozen_to(
    layout: Layout,
    path: Path,
    samples: Samples,
    work: Work,
    rows: dict[str, str],
    taken: Rowwise | None,
    sort: set[str],
) -> list[Slice]:
    return _write(_frozen(layout, samples, work, taken, sort), path, rows)


def _frozen(
    layout: Layout, samples: Samples, work: Work, taken: Rowwise | None, sort: set[str]
) -> Iterator[tuple[pa.Table, int]]:
    """The rows to try in the form of the work set, shard by shard, and how many of them are out of date."""
    for covered in rows_covered(samples, work, taken, sort):
        late = outdated.are_out_of_date(covered, work.stage, work.signature, layout)
        tried = is_tried(work, covered, late)
        if tried.any():
            rows = covered.filter(pa.array(tried))
            yield _as_work(rows, work), int(np.count_nonzero(late & tried))


def _write(parts: Iterator[tuple[pa.Table, int]], path: Path, rows: dict[str, str]) -> list[Slice]:
    slices: list[Slice] = []
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []
    position = 0
    try:
        for part, again in parts:
            shard = part["shard"][0].as_py()
            slices.append(Slice(shard, position, part.num_rows, rows[shard], again))
            position += part.num_rows
            waiting.append(part)
            if writer is None:
                writer = pq.ParquetWriter(path, part.schema, compression="zstd", compression_level=1)
            if sum(table.num_rows for table in waiting) >= READ_ROWS:
                writer.write_table(pa.concat_tables(waiting), row_group_size=READ_ROWS)
                waiting.clear()
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=READ_ROWS)
        return slices
    finally:
        if writer is not None:
            writer.close()
        else:
            path.touch()


def _as_work(rows: pa.Table, work: Work) -> pa.Table:
    """Rows in the form of the work set."""
    result = rows.append_column("inputs", outdated.inputs_now(rows, work.stage, work.signature))
    for field in work.stage.inputs:
        at = result.column_names.index(field.name)
        result = result.set_column(at, field.name, result[field.name].cast(field.type))
    result = result.append_column("previous_run", result[f"{work.stage.name}_by"])
    for name in formats_asked(work.stage):
        result = result.append_column(name, rows[f"{work.stage.name}_format_asked"])
    names = [*(field.name for field in work.stage.inputs), *formats_asked(work.stage)]
    return result.select([*ROW_KEYS, *names, *WORK_COLUMNS])


def cut(slices: Sequence[Slice], tasks: int) -> list[list[Slice]]:
    """Divides whole shards among at most `tasks` tasks: shards in sequence, about the same number of rows per task."""
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


def task_of(slices: Sequence[Slice]) -> dict[str, Any]:
    """The work of a task as json, for `read_task`."""
    return {"slices": [asdict(part) for part in slices]}


def read_task(run: RunFiles, number: int) -> list[Slice]:
    """The slices that are the work of a task."""
    data = json.loads(run.task(number).read_text("utf-8"))
    return [Slice(**part) for part in data["slices"]]


def read_slice(run: RunFiles, part: Slice) -> pa.Table:
    """The rows of one shard: shard, row, uid, the stage's inputs, previous_run, inputs, source_changed."""
    file, ends = _opened(run.workset, run.workset.stat().st_ino)
    groups = range(
        int(np.searchsorted(ends, part.first, "right")),
        int(np.searchsorted(ends, part.first + part.count, "left")) + 1 if part.count else 0,
    )
    before = int(ends[groups.start - 1]) if groups.start else 0
    return file.read_row_groups(list(groups)).slice(part.first - before, part.count)


@lru_cache(maxsize=1)
def _opened(path: Path, inode: int) -> tuple[pq.ParquetFile, np.ndarray]:
    """A work set, and where each of its row groups ends. A task reads it twice per shard, but its footer only once."""
    file = pq.ParquetFile(path)
    groups = range(file.num_row_groups)
    return file, np.cumsum([file.metadata.row_group(group).num_rows for group in groups], dtype=np.int64)


def narrow_to(shards: Sequence[str], have: Sequence[str]) -> list[str]:
    """The shards of a pipeline that the table has, in the pipeline's order."""
    known = set(have)
    return [shard for shard in shards if shard in known]
