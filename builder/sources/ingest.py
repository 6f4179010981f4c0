"""Ingests one shard: reads it, compares it with the table, commits its rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from builder.errors import ShardError
from builder.sources.base import Read, Source
from builder.sources.changes import follow
from builder.store.layout import Layout, shard_name_fault
from builder.table.column_files import read_column_file
from builder.table.commits import commit_source
from builder.table.origin import Origin


@dataclass
class Ingested:
    """The result of ingesting one shard.

    Attributes:
        rows: how many rows it has.
        failed: how many of these have a sample that cannot be used.
        changed: how many of these have a sample that changed since an earlier ingest.
        read: what was read.
    """

    rows: int
    failed: int
    read: Read
    changed: int = 0


def is_same_on_disk(one: Origin | None, other: Origin) -> bool:
    """Whether the bytes of a shard are taken to be the same: same size and time of modification, at any path."""
    return one is not None and (one.size, one.mtime_ns) == (other.size, other.mtime_ns)


def ingest_shard(layout: Layout, source: Source, shard: str, path: Path, run: str) -> Ingested:
    """Reads one shard and commits its rows.

    Raises:
        ShardError: the shard cannot be used; the table keeps the rows that it has.
    """
    if fault := shard_name_fault(shard, path):
        raise ShardError(f"the shard's name cannot be used: {fault}", where={"file": path}, fix="rename the file")
    origin = source.identify(path)
    read = source.read(path, shard, run)
    failed = read.table["source_status"].to_pylist().count("failed")
    done = Ingested(read.table.num_rows, failed, read)

    def following(earlier: Sequence[Path]) -> pa.Table:
        rows = read.table
        if earlier:
            before = read_column_file(earlier[0])
            known = None if is_same_on_disk(before.source, origin) else source.digests(path, rows)
            older = (read_column_file(file).table for file in earlier[1:])
            rows, done.changed = follow(rows, itertools.chain([before.table], older), known, run)
        if source.identify(path) != origin:
            raise ShardError(
                "the shard changed while it was read", where={"file": path}, fix="run the same command again"
            )
        return rows

    commit_source(layout, shard, replace(origin, end_mark=read.end_mark), following)
    return done
