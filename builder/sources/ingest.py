"""One shard into the table: read, compared with what was read before, committed."""

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
    """What ingest did with one shard.

    Attributes:
        rows: how many it has.
        failed: of these, rows whose sample cannot be used.
        changed: of these, samples that are not as an earlier ingest has read them.
        read: what was read.
    """

    rows: int
    failed: int
    read: Read
    changed: int = 0


def is_same_on_disk(one: Origin | None, other: Origin) -> bool:
    """Whether a shard's bytes are trusted to be the same: a file of one size and time, wherever it lies."""
    return one is not None and (one.size, one.mtime_ns) == (other.size, other.mtime_ns)


def ingest_shard(layout: Layout, source: Source, shard: str, path: Path, run: str) -> Ingested:
    """Reads one shard and commits its rows.

    Raises:
        ShardError: it cannot be used; the table keeps what it had of it.
    """
    if fault := shard_name_fault(shard, path):
        raise ShardError(f"the shard's name cannot be used: {fault}", where={"file": path}, fix="rename the file")
    origin = source.identify(path)
    read = source.read(path, shard, run)
    failed = read.table["source_status"].to_pylist().count("failed")
    done = Ingested(read.table.num_rows, failed, read)

    def following(earlier: Sequence[Path]) -> pa.Table:
        found = read.table
        if earlier:
            before = read_column_file(earlier[0])
            known = None if is_same_on_disk(before.source, origin) else source.digests(path, found)
            older = (read_column_file(file).table for file in earlier[1:])
            found, done.changed = follow(found, itertools.chain([before.table], older), known, run)
        if source.identify(path) != origin:
            raise ShardError(
                "the shard changed while it was read", where={"file": path}, fix="run the same command again"
            )
        return found

    commit_source(layout, shard, replace(origin, end_mark=read.end_mark), following)
    return done
