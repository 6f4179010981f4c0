"""Opens a tar shard for reading at the offsets in the table, if it is still the one that was ingested."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import machine
from builder.errors import ConflictError, ShardError
from builder.sources.members import AGAIN
from builder.store import files
from builder.store.layout import Layout
from builder.table import partitions
from builder.table.origin import Origin
from builder.tar import head_check

#: Rows whose headers are compared at a time, for a shard whose time of modification changed.
_ROWS_A_STEP = 4096


@contextlib.contextmanager
def opened(layout: Layout, shard: str, source: Origin) -> Iterator[int]:
    """A source shard, open for reading at offsets.

    A shard whose time of modification changed is accepted if every member header is still where the table says.

    Raises:
        ShardError: the shard is gone, may not be read, or has another size or other headers than when it was ingested.
        OSError: a disk or a file server does not open or read it.
    """
    try:
        descriptor = os.open(source.path, os.O_RDONLY)
    except OSError as error:
        if machine.is_of_the_machine(error):
            raise
        raise ShardError(
            f"the source shard cannot be read: {error.strerror}", where={"file": source.path}, fix=AGAIN
        ) from error
    try:
        with files.naming(Path(source.path)):
            stat = os.fstat(descriptor)
            if stat.st_size != source.size:
                raise _changed(source, bytes=f"expected {source.size}, found {stat.st_size}")
            if stat.st_mtime_ns != source.mtime_ns:
                _check_heads(descriptor, layout, shard, source)
                if os.fstat(descriptor).st_mtime_ns != stat.st_mtime_ns:
                    raise _changed(source, time="it is being written to")
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class OpenTar:
    """A source shard that is open for reading members at their offsets."""

    descriptor: int
    source: Origin

    def read(self, place: dict[str, Any]) -> bytes:
        """The bytes of one member; see `builder.sources.base.OpenShard`."""
        try:
            return files.read_at(self.descriptor, place["data"], place["size"])
        except ShardError as error:
            size = os.fstat(self.descriptor).st_size
            if size == self.source.size:
                raise
            raise ConflictError(
                "the source shard was cut while it was read",
                where={"file": self.source.path, "bytes": f"expected {self.source.size}, found {size}"},
                fix=AGAIN,
            ) from error


def _changed(source: Origin, **place: object) -> ShardError:
    return ShardError("the source shard changed since it was ingested", where={"file": source.path, **place}, fix=AGAIN)


def _check_heads(descriptor: int, layout: Layout, shard: str, source: Origin) -> None:
    """Compares the headers of every member, including prefixes, with the table.

    Raises:
        ShardError: a header differs.
    """
    places, state = partitions.read_partition(layout, shard, ["key", "source_members"])
    if state.source != source:
        raise ShardError("the shard was ingested again meanwhile", fix="run the same command again")
    for start in range(0, places.num_rows, _ROWS_A_STEP):
        rows = places.slice(start, _ROWS_A_STEP)
        pairs = zip(rows["key"].to_pylist(), rows["source_members"].to_pylist(), strict=True)
        expected = [(f"{key}.{place['ext']}", place) for key, members in pairs for place in members]
        names, sizes = [name for name, _ in expected], [place["size"] for _, place in expected]
        heads = [os.pread(descriptor, place["data"] - place["header"], place["header"]) for _, place in expected]
        other = head_check.first_other_head(heads, names, sizes)
        if other is not None:
            at = expected[other][1]["header"]
            raise _changed(source, offset=at, member=f"expected '{names[other]}' of {sizes[other]} bytes")
