"""What is the machine's: errors that say nothing of the row or the shard in hand, and would not come on a quiet day.

Owns which error is one, of which sort, and its words. Errors are sorted by what they say, wherever they were raised:
every place that makes a status of an error asks here first.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TypeVar

from builder.errors import MachineError
from builder.store.files import ReadError, file_system, strerror

T = TypeVar("T")
#: Seconds before a disk or a server that did not answer is asked again.
PAUSE_S = 0.5


class Sort(Enum):
    """What helps against an error of the machine."""

    #: Less memory at a time: half of the batch may fit.
    MEMORY = "memory"
    #: Another try: a file, a disk or a server did not answer, others may.
    ACCESS = "access"
    #: Nothing: whatever is tried next fares no better, as on a full disk.
    SHORTAGE = "shortage"


_SHORTAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
#: By name, since not every system has them all: disks, file servers and networks that do not answer, limits of files.
_ACCESS = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENXIO", "ENODEV", "ENOLINK", "ENOLCK", "EUCLEAN", "EFBIG", "EBUSY",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "ESHUTDOWN", "ECONNABORTED",
        "ECONNREFUSED", "ECONNRESET", "ENOBUFS", "ECOMM", "ENONET", "ENOKEY", "EKEYEXPIRED", "EKEYREVOKED",
    )
    if hasattr(errno, name)
}  # fmt: skip
#: Classes of other libraries, by name: none of these is imported to ask. torch, duckdb, cupy.
_MEMORY_CLASSES = {"OutOfMemoryError", "OutOfMemoryException"}
#: Packages whose errors, of whatever class, are known by their words.
_NATIVE = ("cv2", "cupy", "duckdb", "_duckdb", "jaxlib", "onnxruntime", "pyarrow", "tensorflow", "torch")
#: Source: the texts of the C library, CUDA, cuBLAS, cuDNN, torch's and onnxruntime's allocators, Pillow, XLA.
_MEMORY_WORDS = re.compile(
    r"out of memory|not enough memory|insufficient memory|(can't|cannot|could not|fail(ed)? to) allocate|"
    r"bad_alloc|bad allocation|_ALLOC_FAILED|RESOURCE_EXHAUSTED",
    re.I,
)
#: The loader's words where a library finds no room, as under `ulimit -v`. Source: glibc, elf/dl-load.c.
_UNMAPPED = re.compile(r"failed to map segment|cannot allocate memory|cannot map zero-fill pages", re.I)
_THREAD_WORDS = re.compile(
    rf"can't start new thread|could not (start|create) (a )?(new )?thread|pthread_create|"
    rf"{re.escape(os.strerror(errno.EAGAIN))}",
    re.I,
)
#: How libraries in C name the system's number in a text: "[errno 24]", "errno = 5".
_NUMBER = re.compile(r"\berrno\s*[=:]?\s*(\d+)", re.I)
#: DuckDB's words for what the SQL names and is not there.
_NOT_THERE = re.compile(r"no files found|no such file|is a directory|not a directory|permission denied", re.I)

#: Answers of the system in words, and what to do about them.
_IN_WORDS = {
    errno.ENOSPC: ("the disk is full", "free some space, or set dataset.root to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "delete something of yours there, or ask for more"),
    errno.EROFS: ("the file system is read-only", "mount it writable, or set dataset.root to a folder that is"),
    errno.EIO: ("the disk has an input/output error", "see dmesg for the disk, or ask whoever keeps the file server"),
    errno.ESTALE: ("the file server knows the file no more", "see that it is mounted and answers (ls the folder)"),
    errno.ETIMEDOUT: ("the file server does not answer in time", "see that it is mounted and answers (ls the folder)"),
    errno.EMFILE: ("this process has too many files open", "raise its limit: ulimit -n 4096"),
    errno.ENFILE: ("this machine has too many files open", "end other programs, or raise it: sysctl fs.file-max"),
    errno.EAGAIN: ("the system gives this process no more threads", "end other programs, or raise it: ulimit -u"),
    errno.ENOMEM: ("there is too little memory", "end other programs, or set fewer workers or a smaller batch_rows"),
    errno.EFBIG: ("a file is larger than this process may write", "raise its limit: ulimit -f unlimited"),
    errno.EACCES: ("permission denied", "chmod or chown it, or set dataset.root to a folder of your own"),
    errno.EPERM: ("operation not permitted", "chown it, or set dataset.root to a folder of your own"),
}  # fmt: skip
#: Those that are of the file system of a file.
_ON_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
#: Characters of a library's own words that a message repeats.
_SAID = 300


def sort_of(error: BaseException) -> Sort | None:
    """Of which sort of the machine's an error is, or what it was raised from; None for any other."""
    return next((sort for each in _chain(error) if (sort := _sort_of_one(each)) is not None), None)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error says nothing of the row or shard in hand: the same work may be done later as it is."""
    return sort_of(error) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or a device has no memory left."""
    return sort_of(error) is Sort.MEMORY


def asked_again(work: Callable[[], T]) -> T:
    """What `work` returns, begun a second time if a disk or a server did not answer it."""
    try:
        return work()
    except Exception as error:
        if sort_of(error) is not Sort.ACCESS:
            raise
    time.sleep(PAUSE_S)
    return work()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or (None if here.__suppress_context__ else here.__context__)


def _sort_of_one(error: BaseException) -> Sort | None:
    kinds = type(error).__mro__
    if isinstance(error, MachineError):
        return error.sort if isinstance(error.sort, Sort) else None
    if isinstance(error, MemoryError) or any(kind.__name__ in _MEMORY_CLASSES for kind in kinds):
        return Sort.MEMORY
    if isinstance(error, ImportError) and _UNMAPPED.search(str(error)):
        return Sort.MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        return _sort_of_number(error.errno)
    is_native = any(kind.__module__.partition(".")[0] in _NATIVE for kind in kinds)
    if not is_native and type(error) not in (OSError, RuntimeError):
        return None
    text = str(error)
    if (isinstance(error, OSError) or is_native) and (number := _NUMBER.search(text)):
        return _sort_of_number(int(number[1]))
    if _MEMORY_WORDS.search(text):
        return Sort.MEMORY
    if _THREAD_WORDS.search(text):
        return Sort.SHORTAGE
    if any(kind.__name__ == "IOException" for kind in kinds) and not _NOT_THERE.search(text):
        return _sort_of_text(text) or Sort.ACCESS
    return None


def _sort_of_number(number: int) -> Sort | None:
    if number == errno.ENOMEM:
        return Sort.MEMORY
    if number in _SHORTAGE:
        return Sort.SHORTAGE
    return Sort.ACCESS if number in _ACCESS else None


def _sort_of_text(text: str) -> Sort | None:
    """Of an error whose library gives the system's words without its number."""
    return Sort.SHORTAGE if any(os.strerror(number) in text for number in _SHORTAGE) else None


def told(error: BaseException) -> MachineError:
    """What the machine answered, where, and what to do about it; of any error of the system, the machine's or not."""
    cause = next((each for each in _chain(error) if _sort_of_one(each)), error)
    if isinstance(cause, MachineError):
        return cause
    number = _number_of(cause)
    what, fix = _IN_WORDS.get(number, (strerror(cause) if isinstance(cause, OSError) else _said(cause), "mend that"))
    place: dict[str, object] = {}
    if isinstance(cause, OSError) and cause.filename is not None:
        place["file"] = cause.filename
        if number in _ON_DISK:
            place["file system"] = file_system(Path(os.fsdecode(cause.filename)).parent)
    if isinstance(cause, ReadError):
        place["where in it"] = str(cause).partition(" of the file")[0]
    if not isinstance(cause, OSError) and str(cause) and what != _said(cause):
        place["said"] = _said(cause)
    said = MachineError(what, where=place, fix=f"{fix}; then run the same command again: what is committed is kept")
    said.sort = _sort_of_one(cause)
    return said


def _number_of(error: BaseException) -> int:
    """The system's number for an error, 0 if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    sort = _sort_of_one(error)
    if sort is Sort.MEMORY:
        return errno.ENOMEM
    if sort is not None and (number := _NUMBER.search(str(error))):
        return int(number[1])
    return errno.EAGAIN if sort is Sort.SHORTAGE and _THREAD_WORDS.search(str(error)) else 0


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_SAID] if text else type(error).__name__
