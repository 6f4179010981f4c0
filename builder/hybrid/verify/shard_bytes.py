"""A tar with its index; its bytes are read, never mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.errors import BuilderError
from builder.hybrid.verify.problem import Wrong, reason
from builder.store import files
from builder.tar import indexing
from builder.tar.index import Index


def indexed(path: Path, whose: str, fix: str) -> Index:
    """The index of a tar.

    Args:
        whose: the name of the tar in the message.

    Raises:
        Wrong: it cannot be indexed.
    """
    try:
        return indexing.index(path)
    except (BuilderError, OSError) as error:
        raise Wrong(f"{whose}: {reason(error)}", fix) from error


class IndexedTar:
    """The bytes of one tar, by range and by member.

    They are read and not mapped: a page of a mapping that cannot be read would kill the process.
    """

    def __init__(self, index: Index, descriptor: int) -> None:
        self.index, self.names = index, index.names
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), fewer if the file is shorter."""
        stop = min(stop, self._size)
        return files.read_at(self._descriptor, start, max(stop - start, 0))

    def head(self, i: int) -> bytes:
        """The header of a member, with the headers in front of it."""
        return self.read(int(self.index.header[i]), int(self.index.data[i]))

    def content(self, i: int) -> bytes:
        """The content of a member."""
        start = int(self.index.data[i])
        return self.read(start, start + int(self.index.size[i]))

    def behind(self, i: int) -> bytes:
        """The bytes from the end of a member's content to the next record."""
        start = int(self.index.data[i]) + int(self.index.size[i])
        return self.read(start, start + -start % 512)


@contextmanager
def opened_tar(path: Path, index: Index) -> Iterator[IndexedTar]:
    """A tar for reading."""
    with path.open("rb", buffering=0) as file:
        yield IndexedTar(index, file.fileno())
