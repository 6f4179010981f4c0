"""The table on disk: commit column files, fold them into partitions, heal, realign, sweep.

Owns the rules by which rows reach `columns/`, `samples/` and `schema/`. No lock, no lease, no clock: a generation is
created once or not at all, and the partition is a pure function of the newest generations.

A sample is known by its key: of several with one key the n-th stays the n-th. `rows` is the identity of a shard's rows,
recorded by every column file and work set: files of one `rows` are aligned row by row. An ingest that finds the same
keys in the same order keeps it, whatever else changed. Of files with different `rows` the answers move to where their
key is now; those of keys that are gone stay in the column file, behind the shard's rows, and come back with the key. So
an ingest drops no answer: whether it is still that of its sample, `builder.engine.outdated` tells. A task of other rows
than the shard has now leaves the shard."""

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

#: Generations of a column file that a sweep keeps: readers may still hold the listing before the newest.
KEPT_GENERATIONS = 2
ROWS_KEY, SOURCE_KEY, SWEPT_KEY, GONE_KEY, FOLDED_KEY, SCHEMA_KEY = (
    b"builder." + name for name in (b"rows", b"source", b"swept", b"gone", b"folded", b"schema")
)
#: Which sample of a shard it is: its key, and how many before it have that key.
Identity: TypeAlias = tuple[str, int]


@dataclass(frozen=True)
class Content:
    """One column file, read.

    Attributes:
        table: its rows; behind those of the shard the answers of samples that are gone.
        rows: identity of the shard's rows.
        gone: which samples the last rows are of.
    """

    table: pa.Table
    rows: str
    swept: tuple[str, ...] = ()
    source: Origin | None = None
    gone: tuple[Identity, ...] = ()

    @property
    def of_shard(self) -> pa.Table:
        """The rows that the shard has."""
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
    found: dict[str, list[int]] = {}
    for name in names(folder):
        if parsed := generation_of(name):
            found.setdefault(parsed[0], []).append(parsed[1])
    return {stage: sorted(generations) for stage, generations in found.items()}


def renew_listing(folder: Path) -> None:
    """Makes and removes a file in a folder, which renews a listing of it that NFS has cached."""
    if folder.is_dir():
        probe = files.check_no_link(files.temp_path(folder / "listing"))
        probe.touch()
        probe.unlink(missing_ok=True)


def newest(layout: Layout, shard: str, *, fresh: bool = False) -> dict[str, int]:
    """The newest generation of every stage of a shard."""
    return {stage: generations[-1] for stage, generations in listing(layout, shard, fresh=fresh).items()}


def read_column_file(path: Path, columns: Sequence[str] | None = None) -> Content:
    """One column file, or some of its columns.

    Raises:
        ShardError: it is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=list(columns) if columns is not None else None)
            return _content(table.replace_schema_metadata(None), file.schema_arrow.metadata or {})
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; pages that do not decompress are an OSError without a number
        raise ShardError(
            "a column file is damaged",
            where={"file": path, "reason": str(error)},
            fix=f"rm '{path}', then the same command again: the generation before it counts, or its work is done anew",
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
    """One row group, zstd 1, a dictionary only where values repeat: smallest and fastest of those measured."""
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
    """A column out of a stage's column file; null where the file is older than the column or than its type."""
    if column.name in stage.column_names and stage[column.name].type == column.type:
        return stage[column.name]
    return pa.nulls(count, column.type)


def aligned(
    layout: Layout, shard: str, stage: str, content: Content, found: dict[str, list[int]], source: Content
) -> Content:
    """A stage's answers, their rows those of `source`: moved to where their key is now if those are others."""
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
    """Answers that stand in the order of `old`, in that of `source`; those of samples that it lacks behind them."""
    new = identities(source.table["key"].to_pylist())
    place = {identity: row for row, identity in enumerate(old)}
    has_answer = content.table[f"{stage}_run"].is_valid().to_pylist()
    lacking = set(old) - set(new)
    gone = [row for row, identity in enumerate(old) if identity in lacking and has_answer[row]]
    take = pa.array([*(place.get(identity) for identity in new), *gone], pa.int64())
    return Content(content.table.take(take), source.rows, content.swept, gone=tuple(old[row] for row in gone))


def newest_content(layout: Layout, shard: str, stage: str) -> tuple[int, Content]:
    """The newest column file of a stage and its generation; before the first one, no answer for any row and 0."""
    found = newest(layout, shard, fresh=True)
    if stage in found:
        return found[stage], read_column_file(layout.column_file(shard, stage, found[stage]))
    source = read_column_file(layout.column_file(shard, SOURCE, found[SOURCE]), ["row"])
    count = source.table.num_rows
    empty = {column.name: pa.nulls(count, column.type) for column in schema.status_columns(stage)}
    return 0, Content(pa.table(empty), source.rows)


def identities(keys: Sequence[str]) -> list[Identity]:
    """Which sample each row of a shard is."""
    count: Counter[str] = Counter()
    found = []
    for key in keys:
        found.append((key, count[key]))
        count[key] += 1
    return found
