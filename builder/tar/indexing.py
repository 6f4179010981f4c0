"""Indexes every member of a tar file, from its path, its mapping or an open file.

Knows nothing of samples. A record is a member's prefixes (pax and GNU headers), its header and its padded data; it is
always copied or dropped as a whole."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from builder.errors import ShardError
from builder.store import files
from builder.tar.chain import chain_of
from builder.tar.index import Index
from builder.tar.refusals import refuse_compressed, refuse_other
from builder.tar.walk import walk


def index(path: Path) -> Index:
    """Reads every header of a tar and verifies the checksums; reads the whole file once.

    Raises:
        ShardError: empty, compressed, truncated, a damaged header, data after the end; with the byte offset.
    """
    with mapped(path) as view:
        return index_of(view, path)


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """A tar mapped into memory.

    Raises:
        ShardError: the file is empty.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ShardError("the shard is empty (0 bytes)", where={"file": path}, fix="download or make it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            _page_in(view, file.fileno())
            yield view


#: Source: Linux's mman.h, from 5.14 on.
_MADV_POPULATE_READ = getattr(mmap, "MADV_POPULATE_READ", 22)
#: Bytes paged in, or read, at a time.
_PAGED_IN = 16 << 20


def _page_in(view: mmap.mmap, descriptor: int) -> None:
    """Reads every page of a mapping now: a read error at a later access would kill the process.

    Raises:
        ReadError: the disk does not return a page.
        ShardError: the file was cut meanwhile.
    """
    size = len(view)
    for start in range(0, size, _PAGED_IN):
        step = min(_PAGED_IN, size - start)
        try:
            view.madvise(_MADV_POPULATE_READ, start, step)
        except OSError as error:
            if error.errno not in (errno.EFAULT, errno.EIO):
                return  # not supported, or too little memory: pages are read when they are accessed
            files.read_at(descriptor, start, step)  # its error says which byte cannot be read


def index_of(view: mmap.mmap, path: Path) -> Index:
    """`index` for a tar that is already mapped."""
    refuse_compressed(view, path)
    refuse_other(view, path)
    try:
        quick = chain_of(view)
        return walk(view) if quick is None else quick
    except ShardError as error:
        error.where = {"file": path, **error.where}
        raise


def index_from(descriptor: int, start: int, size: int) -> Index:
    """Indexes the members of a file of `size` bytes from byte `start` on: 0, or the end of a record.

    Raises:
        ShardError: no records follow, or the file is shorter than `size`.
    """
    return walk(cast(mmap.mmap, _File(descriptor, size)), start)


class _File:
    """An open file that is read like a mapping, but raises an error if it is cut meanwhile; a mapping would crash."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice | int) -> bytes | int:
        if isinstance(place, int):
            return files.read_at(self._descriptor, place, 1)[0]
        start, stop, _ = place.indices(self._size)
        return files.read_at(self._descriptor, start, max(stop - start, 0))
