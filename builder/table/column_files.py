"""Column files: the answers of one stage for one shard, and how they follow a shard whose rows changed.

Owns the form of the files in `columns/`. The table needs no lock, no lease and no clock: a generation is created once
or not at all, and a partition is a pure function of the newest generations.

A sample is identified by its key; of several samples with one key, the n-th stays the n-th. `rows` is the identity of a
shard's rows, recorded in every column file and work set: files with the same `rows` are aligned row by row. An ingest
that finds the same keys in the same order keeps `rows`, whatever else changed. If the `rows` of two files differ,
answers move to where their key is now. Answers whose key is gone stay in the column file, after the shard's rows, and
return with the key. So an ingest never drops an answer; `builder.engine.outdated` decides whether it still belongs to
its sample. A task planned for other rows than the shard has now leaves the shard alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from builder.errors import ShardError
from builder.store import files
from builder.store.layout import Layout, generation_of, names
from builder.table import schema
from builder.table.origin import Origin
from builder.table.schema import SOURCE, Column

#: Generations of a column file that a sweep keeps: readers may still use the one before the newest.
KEPT_GENERATIONS = 2
ROWS_KEY, SOURCE_KEY, SWEPT_KEY, GONE_KEY, FOLDED_KEY, SCHEMA_KEY = (
    b"builder." + name for name in (b"rows", b"source", b"swept", b"gone", b"folded", b"schema")
)
#: Identifies a sample in its shard: its key, and how many samples before it have the same key.
Identity: TypeAlias = tuple[str, int]


@dataclass(frozen=True)
class Content:
    """The content of one column file.

    Attributes:
        table: the rows of the shard, followed by the answers of samples that are gone.
        rows: identity of the shard's rows.
        gone: the samples of those last rows.
    """

    table: pa.Table
    rows: str
    swept: tuple[str, ...] = ()
    source: Origin | None = None
    gone: tuple[Identity, ...] = ()

    @property
    def of_shard(self) -> pa.Table:
        """The rows of the shard, without those of samples that are gone."""
        return self.table.slice(0, self.table.num_rows - len(self.gone))


# --- column files ---


def listing(layout: Layout, shard: str, *, fresh: bool = False) -> dict[str, list[int]]:
    """Generations of every stage of a shard, ascending: the whole state of the shard.

    Args:
        fresh: renews a cached listing first.
    """
    folder = layout.column_folder(shard)
    if fresh:
        renew_listing(folder)
    by_stage: dict[str, list[int]] = {}
    for name in names(folder):
        if parsed := generation_of(name):
            by_stage.setdefault(parsed[0], []).append(parsed[1])
    return {stage: sorted(generations) for stage, generations in by_stage.items()}


def renew_listing(folder: Path) -> None:
    """Creates and removes a file in a folder, so that NFS renews its cached listing of it."""
    if folder.is_dir():
        probe = files.check_no_link(files.temp_path(folder / "listing"))
        with files.naming(folder):
            probe.touch()
            probe.unlink(missing_ok=True)


def newest(layout: Layout, shard: str, *, fresh: bool = False) -> dict[str, int]:
    """The newest generation of every stage of a shard."""
    return {stage: generations[-1] for stage, generations in listing(layout, shard, fresh=fresh).items()}


def read_column_file(path: Path, columns: Sequence[str] | None = None) -> Content:
    """Reads a column file, or some of its columns.

    Raises:
        ShardError: the file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=list(columns) if columns is not None else None)
            return _content(table.replace_schema_metadata(None), file.schema_arrow.metadata or {})
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk; pyarrow raises OSError without errno for pages that do not decompress
        raise ShardError(
            "a column file is damaged",
            where={"file": path, "reason": str(error)},
            fix=f"rm '{path}', then the same command again: the generation before it counts, or its work is done again",
        ) from error


def _content(table: pa.Table, metadata: dict[bytes, bytes]) -> Content:
    source = metadata.get(SOURCE_KEY)
    return Content(
        table=table,
        rows=metadata[ROWS_KEY].decode(),
        swept=tuple(json.loads(metadata.get(SWEPT_KEY, b"[]"))),
        source=Origin.from_json(source) if source else None,
        gone=tuple((key, number) for key, number in json.loads(metadata.get(GONE_KEY, b"[]"))),
    )


def read_rows(path: Path) -> str:
    return str((pq.read_schema(path).metadata or {})[ROWS_KEY], "ascii")


def write_parquet(table: pa.Table, metadata: dict[bytes, bytes], path: Path | pa.NativeFile) -> None:
    """One row group, zstd 1, a dictionary only where values repeat: the smallest and fastest settings measured."""
    pq.write_table(
        table.replace_schema_metadata(metadata),
        path,
        compression="zstd",
        compression_level=1,
        use_dictionary=schema.dictionary_columns(table.column_names) or False,
        row_group_size=max(table.num_rows, 1),
    )


def commit_file(layout: Layout, shard: str, stage: str, generation: int, content: Content) -> bool:
    metadata = {ROWS_KEY: content.rows.encode()}
    if content.swept:
        metadata[SWEPT_KEY] = json.dumps(content.swept).encode()
    if content.source:
        metadata[SOURCE_KEY] = content.source.to_json()
    if content.gone:
        metadata[GONE_KEY] = json.dumps(content.gone).encode()
    path = layout.column_file(shard, stage, generation)
    return files.create_only(path, partial(write_parquet, content.table, metadata))


def rows_hash(keys: Sequence[str]) -> str:
    """Identity of a shard's rows: 128-bit hash over their keys in order."""
    return hashlib.blake2b(orjson.dumps(keys), digest_size=16).hexdigest()


def column_values(stage: pa.Table, column: Column, count: int) -> Any:
    """A column of a stage's column file; nulls if the file is older than the column or its type."""
    if column.name in stage.column_names and stage[column.name].type == column.type:
        return stage[column.name]
    return pa.nulls(count, column.type)


def aligned(
    layout: Layout, shard: str, stage: str, content: Content, found: dict[str, list[int]], source: Content
) -> Content:
    """A stage's answers aligned with the rows of `source`: if its rows are others, answers move with their key."""
    if content.rows == source.rows:
        return content
    for generation in reversed(found[SOURCE]):
        path = layout.column_file(shard, SOURCE, generation)
        if read_rows(path) == content.rows:
            old = [*identities(read_column_file(path, ["key"]).table["key"].to_pylist()), *content.gone]
            return _moved(stage, content, old, source)
    count = source.table.num_rows
    empty = pa.table({field.name: pa.nulls(count, field.type) for field in content.table.schema})
    return Content(empty, source.rows, content.swept)


def _moved(stage: str, content: Content, old: list[Identity], source: Content) -> Content:
    """Reorders answers from the order of `old` to that of `source`; answers of samples that are gone come last."""
    new = identities(source.table["key"].to_pylist())
    old_row = {identity: row for row, identity in enumerate(old)}
    has_answer = content.table[f"{stage}_run"].is_valid().to_pylist()
    lacking = set(old) - set(new)
    gone = [row for row, identity in enumerate(old) if identity in lacking and has_answer[row]]
    take = pa.array([*(old_row.get(identity) for identity in new), *gone], pa.int64())
    return Content(content.table.take(take), source.rows, content.swept, gone=tuple(old[row] for row in gone))


def newest_content(layout: Layout, shard: str, stage: str) -> tuple[int, Content]:
    """The newest generation of a stage and its content; 0 and rows without answers if the stage has no column file."""
    generations = newest(layout, shard, fresh=True)
    if stage in generations:
        return generations[stage], read_column_file(layout.column_file(shard, stage, generations[stage]))
    source = read_column_file(layout.column_file(shard, SOURCE, generations[SOURCE]), ["row"])
    count = source.table.num_rows
    empty = {column.name: pa.nulls(count, column.type) for column in schema.status_columns(stage)}
    return 0, Content(pa.table(empty), source.rows)


def identities(keys: Sequence[str]) -> list[Identity]:
    """The identity of the sample in each row of a shard."""
    count: Counter[str] = Counter()
    result = []
    for key in keys:
        result.append((key, count[key]))
        count[key] += 1
    return result
