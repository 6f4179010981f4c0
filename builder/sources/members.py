"""Bytes of samples at the offsets that the table has: members of the source, and generated images.

Owns how `(shard, row, member)` becomes bytes. Knows nothing of stages and runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from builder import machine
from builder.errors import ConflictError, ShardError, where
from builder.formats import IMAGE_EXTENSIONS
from builder.store import files
from builder.store.layout import Layout
from builder.table import column_files, partitions
from builder.table.edits import EditsReader
from builder.tar import head_check

#: Name under which the generated image of a row is read.
EDIT = "edit"
#: `<stage>_digest` where nothing was read, and where what was asked for could not be.
NOTHING_READ, NOT_READ = 0, 1
#: Rows whose headers are in memory at a time, while those of a touched shard are compared.
_ROWS_A_STEP = 4096
#: What helps against a source that is not what was ingested.
AGAIN = "put it back, or ingest it as it is now: builder ingest"


def place_of(members: Sequence[dict[str, Any]], member: str) -> dict[str, Any] | None:
    """Where a member lies: `image` is the first of jpg, jpeg, png, webp; else the extension."""
    places = by_extension(members)
    wanted = IMAGE_EXTENSIONS if member == "image" else (member,)
    return next((places[extension] for extension in wanted if extension in places), None)


def by_extension(members: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A sample's members by lower-case extension."""
    return {place["ext"].lower(): place for place in members}


def digest_of(member: str, data: bytes | None) -> int:
    """A member's bytes as 64 bits: others for each name, so that they can be joined, and for a sample that lacks it."""
    name = member if data is not None else f"no {member}"
    digest = hashlib.blake2b(data or b"", digest_size=8, person=name.encode()).digest()
    return max(int.from_bytes(digest, "big"), NOT_READ + 1)


def digests_of(members: Mapping[str, bytes | None]) -> int:
    """`<stage>_digest` of an answer: over all members of the source that were read for it."""
    joined = NOTHING_READ
    for name, data in members.items():
        joined ^= digest_of(name, data)
    return joined


@contextlib.contextmanager
def opened(layout: Layout, shard: str, source: column_files.SourceShard) -> Iterator[int]:
    """A source shard, open for reading at offsets.

    One of another time of modification is good as long as every sample's headers are where the table has them.

    Raises:
        ShardError: it is gone, may not be read, or is not what was ingested: another size, other headers.
        OSError: the machine does not give it.
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


def _changed(source: column_files.SourceShard, **place: object) -> ShardError:
    return ShardError("the source shard changed since it was ingested", where={"file": source.path, **place}, fix=AGAIN)


def _check_heads(descriptor: int, layout: Layout, shard: str, source: column_files.SourceShard) -> None:
    """Compares the headers of every sample, prefixes included, with what the table says of them.

    Raises:
        ShardError: one of them is another.
    """
    places, state = partitions.read_partition(layout, shard, ["key", "source_members"])
    if state.source != source:
        raise ShardError("the shard was ingested again meanwhile", fix="run the same command again")
    for start in range(0, places.num_rows, _ROWS_A_STEP):
        rows = places.slice(start, _ROWS_A_STEP)
        pairs = zip(rows["key"].to_pylist(), rows["source_members"].to_pylist(), strict=True)
        found = [(f"{key}.{place['ext']}", place) for key, members in pairs for place in members]
        names, sizes = [name for name, _ in found], [place["size"] for _, place in found]
        heads = [os.pread(descriptor, place["data"] - place["header"], place["header"]) for _, place in found]
        other = head_check.first_other_head(heads, names, sizes)
        if other is not None:
            at = found[other][1]["header"]
            raise _changed(source, offset=at, member=f"expected '{names[other]}' of {sizes[other]} bytes")


class MemberReader:
    """Reads members of one shard's rows.

    Args:
        members: the names that will be asked for: `image`, an extension, or `edit`; only what these need is opened.

    Attributes:
        is_open: whether the last opening was a good one.
    """

    def __init__(self, layout: Layout, shard: str, members: Sequence[str]) -> None:
        self._layout, self._shard = layout, shard
        self._stack = contextlib.ExitStack()
        self._columns: dict[str, list[Any]] = {}
        self._state: column_files.SourceShard | None = None
        from_source = any(member != EDIT for member in members)
        columns = ["source_members"] * from_source
        columns += ["image_path", "image_offset", "image_size"] * (EDIT in members)
        if columns:
            places, state = partitions.read_partition(layout, shard, columns)
            self._columns = {name: places[name].to_pylist() for name in places.column_names}
            self._state = state.source if from_source else None
        self.is_open = False
        self.reopen()

    def reopen(self) -> None:
        """Opens the shard's files again, as helps where a file server has lost an open one.

        Raises:
            ShardError, OSError: as `opened`; the next read opens them.
        """
        self._stack.close()
        self.is_open = False
        self._edits = self._stack.enter_context(EditsReader(self._layout.root))
        if self._state is not None:
            self._source = self._stack.enter_context(opened(self._layout, self._shard, self._state))
        self.is_open = True

    def rows(self) -> int:
        """How many rows the shard has; 0 where nothing of them is needed."""
        return len(next(iter(self._columns.values()), []))

    def read(self, row: int, member: str) -> bytes | None:
        """The bytes of one member of one row, None if the sample has no such member.

        Raises:
            ShardError: the bytes are not there.
            ConflictError: the source was cut since it was opened.
            OSError: the machine does not give them.
        """
        if not self.is_open:
            self.reopen()
        with where(shard=self._shard, row=row):
            if member == EDIT:
                path, offset, size = (self._columns[f"image_{name}"][row] for name in ("path", "offset", "size"))
                return None if path is None else self._edits.read(path, offset, size)
            place = place_of(self._columns["source_members"][row], member)
            if place is None:
                return None
            try:
                return files.read_at(self._source, place["data"], place["size"])
            except ShardError as error:
                size = os.fstat(self._source).st_size
                if self._state is None or size == self._state.size:
                    raise
                raise ConflictError(
                    "the source shard was cut while it was read",
                    where={"file": self._state.path, "bytes": f"expected {self._state.size}, found {size}"},
                    fix=AGAIN,
                ) from error

    def __enter__(self) -> MemberReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
