"""Partitions: a shard's newest column files in one table, and whether a partition is up to date."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from builder.errors import ShardError, where
from builder.store import files
from builder.store.layout import Layout
from builder.table.column_files import (
    FOLDED_KEY,
    ROWS_KEY,
    SCHEMA_KEY,
    SOURCE_KEY,
    Content,
    aligned,
    column_values,
    listing,
    newest,
    read_column_file,
    write_parquet,
)
from builder.table.origin import Origin
from builder.table.root_schema import load_schema, read_schema
from builder.table.schema import SOURCE, Column


@dataclass(frozen=True)
class State:
    """What a partition was folded from, as recorded in its metadata."""

    generations: dict[str, int]
    schema_generation: int
    rows: str
    source: Origin


# --- fold and heal ---


def fold(layout: Layout, shard: str, *, known: tuple[str, int, Content] | None = None) -> None:
    """Rebuilds a shard's partition from its newest column files and the root's columns.

    Args:
        known: stage, generation and content of a column file that the caller has just committed.
    """
    while True:
        folded = files.retry_listing(partial(_fold_once, layout, shard, known))
        if (newest(layout, shard, fresh=True), load_schema(layout, fresh=True)[0]) == folded:
            return


def _fold_once(layout: Layout, shard: str, known: tuple[str, int, Content] | None = None) -> tuple[dict[str, int], int]:
    table, state = folded(layout, shard, known, fresh=True)
    metadata = folded_metadata(state.generations, state.schema_generation, state.rows, state.source)
    files.write_atomic(layout.partition(shard), partial(write_parquet, table, metadata))
    return state.generations, state.schema_generation


def folded(
    layout: Layout, shard: str, known: tuple[str, int, Content] | None = None, *, fresh: bool = False
) -> tuple[pa.Table, State]:
    """The table of a shard's newest column files, and which files those are; writes nothing.

    Args:
        known: stage, generation and content of a column file that need not be read.
        fresh: renews a cached listing first.

    Raises:
        ShardError: a column file is damaged.
    """
    schema_generation, columns = load_schema(layout)
    found = listing(layout, shard, fresh=fresh)
    newest_of = {stage: generations[-1] for stage, generations in found.items()}
    source = _content_of(layout, shard, SOURCE, newest_of[SOURCE], known)
    assert source.source is not None
    stages = {SOURCE: source.table}
    for stage in newest_of:
        if stage != SOURCE:
            content = _content_of(layout, shard, stage, newest_of[stage], known)
            stages[stage] = aligned(layout, shard, stage, content, found, source).of_shard
    count, none = source.table.num_rows, pa.table({})
    table = pa.table({column.name: column_values(stages.get(column.stage, none), column, count) for column in columns})
    return table, State(newest_of, schema_generation, source.rows, source.source)


def folded_metadata(
    generations: dict[str, int], schema_generation: int, rows: str, source: Origin
) -> dict[bytes, bytes]:
    """The metadata of a partition: what it was folded from."""
    return {
        FOLDED_KEY: json.dumps(generations).encode(),
        SCHEMA_KEY: str(schema_generation).encode(),
        ROWS_KEY: rows.encode(),
        SOURCE_KEY: source.to_json(),
    }


def _content_of(
    layout: Layout, shard: str, stage: str, generation: int, known: tuple[str, int, Content] | None
) -> Content:
    if known is not None and known[:2] == (stage, generation):
        return known[2]
    return read_column_file(layout.column_file(shard, stage, generation))


def partition_state(layout: Layout, shard: str) -> State | None:
    """What a partition was folded from; None if it does not exist or cannot be read, so that it is folded again."""

    def read() -> State | None:
        try:
            with layout.partition(shard).open("rb") as file:
                found = footer_values(file, (FOLDED_KEY, SCHEMA_KEY, ROWS_KEY, SOURCE_KEY))
        except FileNotFoundError:
            return None
        return None if found is None else _state(found)

    return files.retry_listing(read)


def footer_values(file: BinaryIO, keys: Sequence[bytes]) -> dict[bytes, bytes] | None:
    """The metadata of one of our parquet files, read from its end, with at least those of these keys that it has; None
    if it is not a complete parquet file.

    Parsing the whole footer with pyarrow takes 20 to 40 times as long, and there are tens of thousands of partitions.
    pyarrow is used only if a value is not found where we look for it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    if magic != b"PAR1" or length + 8 > size:
        return None
    file.seek(size - 8 - length)
    footer = file.read(length)
    found = {key: _footer_value(footer, key) for key in keys}
    values = {key: value for key, value in found.items() if value is not None}
    if len(values) == len(found):
        return values
    try:
        return dict(pq.read_metadata(file).metadata or {})
    except OSError as error:
        if error.errno is not None:
            raise
        return None  # pyarrow cannot parse the footer
    except pa.ArrowInvalid:
        return None


def _footer_value(footer: bytes, key: bytes) -> bytes | None:
    """The value of a key in a parquet footer, where both are Thrift binaries: a length as varint, then bytes.

    Source: parquet.thrift's KeyValue and Thrift's compact protocol, in which fields 1 and 2 of type binary begin with
    0x18. The key-value pairs of the file are the last ones in the footer.
    """
    start = footer.rfind(b"\x18" + bytes([len(key)]) + key + b"\x18")
    if start < 0:
        return None
    at = start + len(key) + 3
    length = shift = 0
    while at < len(footer):
        byte = footer[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return footer[at : at + length] if at + length <= len(footer) else None
    return None


def _state(metadata: dict[bytes, bytes]) -> State | None:
    try:
        return State(
            generations=dict(json.loads(metadata[FOLDED_KEY])),
            schema_generation=int(metadata[SCHEMA_KEY]),
            rows=metadata[ROWS_KEY].decode(),
            source=Origin.from_json(metadata[SOURCE_KEY]),
        )
    except (KeyError, ValueError, TypeError):  # damaged, or not a partition
        return None


def is_behind(layout: Layout, shard: str) -> bool:
    """Whether a partition lacks answers of its shard's column files."""
    return _is_behind(layout, shard, partition_state(layout, shard), newest(layout, shard), load_schema(layout))


def _is_behind(
    layout: Layout, shard: str, state: State | None, found: dict[str, int], root: tuple[int, tuple[Column, ...]]
) -> bool:
    """Whether a partition differs from the newest generations, or was folded before the root had one of their columns.

    Columns that the column files lack do not count, for example new outputs of a stage: they read as nulls.
    """
    if state is None or state.generations != found:
        return True
    generation, columns = root
    if state.schema_generation == generation:
        return False
    path = layout.schema_file(state.schema_generation)
    try:
        have = _types_of(path, path.stat().st_ino)
    except FileNotFoundError:
        return True
    others = [column for column in columns if column.stage in found and have.get(column.name) != column.type]
    try:
        return any(
            column.name in have
            or column.name in pq.read_schema(layout.column_file(shard, column.stage, found[column.stage])).names
            for column in others
        )
    except (pa.ArrowInvalid, OSError):  # gone or damaged: folding finds a newer one, or reports what is wrong
        return True


@lru_cache(maxsize=64)
def _types_of(path: Path, inode: int) -> dict[str, pa.DataType]:
    """The types of the columns in one generation of a root's schema."""
    return {column.name: column.type for column in read_schema(path)}


def heal(layout: Layout, shards: Iterable[str], *, state: Callable[[str], State | None] | None = None) -> int:
    """Folds the partitions that are behind; returns how many there were.

    Args:
        state: returns the state of a partition if the caller knows it; by default it is read.
    """
    state_of = state or partial(partition_state, layout)
    root = load_schema(layout)
    healed = 0
    for shard in shards:
        known, found = state_of(shard), newest(layout, shard)
        if SOURCE in found and _is_behind(layout, shard, known, found, root):
            with where(shard=shard):
                fold(layout, shard)
            healed += 1
    return healed


def read_partition(layout: Layout, shard: str, columns: Sequence[str]) -> tuple[pa.Table, State]:
    """Columns of one partition in tar order, and what it was folded from; both from the same open file.

    A column that the partition lacks reads as nulls. A part of a nested column is named by its path in the parquet
    file: `source_members.list.element.ext`.
    """

    def read() -> tuple[pa.Table, State]:
        with pq.ParquetFile(layout.partition(shard), pre_buffer=True) as file:
            found = file.read(columns=list(columns), use_threads=False)  # a name that the file lacks is left out
            have = set(found.column_names)
            tops = {name: name if name in have else name.partition(".")[0] for name in columns}
            nothing = pa.nulls(file.metadata.num_rows)
            table = pa.table({name: found[top] if top in have else nothing for name, top in tops.items()})
            state = _state(dict(file.metadata.metadata or {}))
            if state is None:
                raise ShardError("a partition is not of this table", where={"shard": shard}, fix="builder fold")
            return table, state

    return files.retry_listing(read)
