"""A file made of ranges of another file and of new bytes, written in the background.

Many small parts are written with few calls, while more parts are made. This module does not know about tars.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from builder.store import files

T = TypeVar("T")
#: Most bytes and parts that are written with one call. IOV_MAX of Linux is 1024.
_BATCH = 16 << 20
_MAX_PARTS = 1024
#: Bytes written after which a sync starts in the background.
_SYNCED = 64 << 20

#: New bytes, or the range [start, end) of the source.
Part = bytes | tuple[int, int]


def length(part: Part) -> int:
    """The size of a part in bytes."""
    return len(part) if isinstance(part, bytes) else part[1] - part[0]


class Assembly:
    """A file that is being written. When the `with` block ends, everything is written but not synced.

    A thread writes each batch of parts with one call, which releases Python's lock, while the next batch is made. The
    ranges of a batch are written from a mapping of the source, whose pages are loaded first: that is a third faster
    than loading them during the write. The kernel copies a single large range, and may share its blocks.

    A mapping shows zeros after the end of a file that was cut, so the caller checks afterwards that the source has not
    changed.

    Args:
        source: descriptor of the file that ranges are copied from.
        target: descriptor of the new file, at its beginning.

    Attributes:
        size: bytes added.
    """

    def __init__(self, source: int, target: int) -> None:
        # Duplicates: after an interrupted wait a thread may continue when the numbers already belong to other files.
        self._source = os.dup(source)
        try:
            self._target = os.dup(target)
        except OSError:
            os.close(self._source)
            raise
        self._parts: list[Part] = []
        self._waiting = 0  # their bytes
        self._first: int | None = None  # where the first range among them begins
        self._end = 0  # where the last one ends
        self._submitted = self._synced = 0  # bytes handed to the thread; how many of them a sync covers
        self._pool = ThreadPoolExecutor(2, "assembly")
        self._writing: Future[None] | None = None
        self._syncing: Future[None] | None = None
        self.size = 0

    def add(self, parts: Sequence[Part]) -> None:
        """Appends new bytes, and ranges of the source.

        Raises:
            OSError: parts that were added before could not be written. All methods can raise these two.
            ShardError: the source ends before the end of a range that was added before.
        """
        for part in parts:
            if isinstance(part, bytes):
                self._append(part, len(part))
            else:
                self.copy(*part)

    def copy(self, start: int, end: int) -> None:
        """Appends the bytes [start, end) of the source; fastest if called in the source's order."""
        if end <= start:
            return
        is_far = self._first is not None and (start < self._end or end - self._first > 2 * _BATCH)
        if is_far or end - start >= _BATCH:
            self.flush()
        self._first = start if self._first is None else self._first
        self._end = end
        self._append((start, end), end - start)

    def _append(self, part: Part, size: int) -> None:
        self._parts.append(part)
        self.size += size
        self._waiting += size
        if self._waiting >= _BATCH or len(self._parts) >= _MAX_PARTS:
            self.flush()

    def flush(self) -> None:
        """Hands the parts to the thread after it has written the previous ones; at most two batches are in memory."""
        if self._writing is not None:
            self._writing.result()
        if self._submitted - self._synced >= _SYNCED and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._synced = self._submitted
            self._syncing = self._submit(os.fsync, self._target)
        if self._parts:
            self._writing = self._submit(self._write, self._parts)
            self._submitted += self._waiting
            self._parts, self._waiting, self._first = [], 0, None

    def _write(self, parts: list[Part]) -> None:
        left = 0 if len(parts) == 1 else self._written_at_once(parts)
        for part in parts:
            size = length(part)
            if left < size:
                if isinstance(part, bytes):
                    files.write_all(self._target, memoryview(part)[left:])
                else:
                    files.copy_range(self._source, self._target, part[0] + left, part[1])
            left = max(left - size, 0)

    def _written_at_once(self, parts: list[Part]) -> int:
        """Writes with one call; returns how many bytes.

        Not all are written if ranges are far apart, the disk is full or the source is lost.
        """
        try:
            window = _Window(self._source, [part for part in parts if isinstance(part, tuple)])
        except (OSError, ValueError):  # the source is shorter, or cannot be mapped
            return 0  # copying part by part reports the cause
        with window:
            begin = os.lseek(self._target, 0, os.SEEK_CUR)
            try:
                return os.writev(self._target, [p if isinstance(p, bytes) else window.part(*p) for p in parts])
            except OSError as error:
                if error.errno != errno.EFAULT:  # a page of the source is missing
                    raise
                return os.lseek(self._target, 0, os.SEEK_CUR) - begin

    def _submit(self, work: Callable[[T], None], argument: T) -> Future[None]:
        try:
            return self._pool.submit(work, argument)
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, "no thread can be started") from error

    def __enter__(self) -> Assembly:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._pool:
                if error is None:
                    self.flush()
                    for future in self._futures():
                        future.result()
        finally:
            if all(future.done() for future in self._futures()):
                os.close(self._source)
                os.close(self._target)

    def _futures(self) -> list[Future[None]]:
        return [future for future in (self._writing, self._syncing) if future is not None]


class _Window:
    """A mapping of the pages that hold ascending ranges of a file. The pages are loaded first, without Python's lock.

    Raises:
        OSError: the file is shorter, its bytes cannot be read, the file system has no mappings, or most of the mapping
            would lie between the ranges.
        ValueError: the file is shorter.
    """

    def __init__(self, descriptor: int, ranges: list[tuple[int, int]]) -> None:
        self._view = memoryview(b"")
        if not ranges:
            return
        end = ranges[-1][1]
        self._start = ranges[0][0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        if 4 * sum(stop - start for start, stop in ranges) < end - self._start:
            raise OSError(errno.EINVAL, "ranges too far apart")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, self._start, end - self._start, os.POSIX_FADV_WILLNEED)
        if not os.pread(descriptor, 1, end - 1):
            raise OSError(errno.EFAULT, "the file ends before")
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._view = memoryview(mmap.mmap(descriptor, end - self._start, flags, mmap.PROT_READ, offset=self._start))

    def part(self, start: int, end: int) -> memoryview:
        """One range. Only the kernel may read it: a page that cannot be read would kill the process."""
        return self._view[start - self._start : end - self._start]

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.release()  # the mapping is freed with its last part
