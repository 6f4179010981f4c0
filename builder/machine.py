"""Errors of the machine, such as a full disk: they say nothing about the row or shard being processed.

Owns which errors these are, their sort, and their message. An error is classified by its content, wherever it was
raised; code that turns an error into a status asks here first.
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

from builder.errors import MachineError, TransientError
from builder.store.files import ReadError, file_system, strerror

T = TypeVar("T")
#: Seconds to wait before a disk or a server that did not answer is tried again.
PAUSE_S = 0.5


class Sort(Enum):
    """What helps against an error of the machine."""

    #: Less memory at a time: half of the batch may fit.
    MEMORY = "memory"
    #: Another try: a file, a disk or a server did not answer; others may.
    ACCESS = "access"
    #: Nothing: the next try would fail too, as on a full disk.
    SHORTAGE = "shortage"


_SHORTAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
#: By name, since not every system has all of them: disks, file servers and networks that do not answer, file limits.
_ACCESS = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENXIO", "ENODEV", "ENOLINK", "ENOLCK", "EUCLEAN", "EFBIG", "EBUSY",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "ESHUTDOWN", "ECONNABORTED",
        "ECONNREFUSED", "ECONNRESET", "ENOBUFS", "ECOMM", "ENONET", "ENOKEY", "EKEYEXPIRED", "EKEYREVOKED",
    )
    if hasattr(errno, name)
}  # fmt: skip
#: Classes of torch, duckdb and cupy, by name, so that none of them has to be imported.
_MEMORY_CLASSES = {"OutOfMemoryError", "OutOfMemoryException"}
#: Packages whose errors are recognized by their text, whatever their class.
_NATIVE = ("cv2", "cupy", "duckdb", "_duckdb", "jaxlib", "onnxruntime", "pyarrow", "tensorflow", "torch")
#: Source: the texts of the C library, CUDA, cuBLAS, cuDNN, torch's and onnxruntime's allocators, Pillow, XLA.
_MEMORY_WORDS = re.compile(
    r"out of memory|not enough memory|insufficient memory|(can't|cannot|could not|fail(ed)? to) allocate|"
    r"bad_alloc|bad allocation|_ALLOC_FAILED|RESOURCE_EXHAUSTED",
    re.I,
)
#: The loader's text if there is no memory for a library, as under `ulimit -v`. Source: glibc, elf/dl-load.c.
_UNMAPPED = re.compile(r"failed to map segment|cannot allocate memory|cannot map zero-fill pages", re.I)
_THREAD_WORDS = re.compile(
    rf"can't start new thread|could not (start|create) (a )?(new )?thread|pthread_create|"
    rf"{re.escape(os.strerror(errno.EAGAIN))}",
    re.I,
)
#: How C libraries write the errno value in a message: "[errno 24]", "errno = 5".
_NUMBER = re.compile(r"\berrno\s*[=:]?\s*(\d+)", re.I)
#: DuckDB's text for a file that the SQL names and that does not exist or may not be read.
_NOT_THERE = re.compile(r"no files found|no such file|is a directory|not a directory|permission denied", re.I)

#: For each errno value: what happened, and what to do about it.
_IN_WORDS = {
    errno.ENOSPC: ("the disk is full", "free some space, or set dataset.root to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "delete some of your files there, or ask for more"),
    errno.EROFS: ("the file system is read-only", "mount it writable, or set dataset.root to a folder that is"),
    errno.EIO: ("the disk has an input/output error", "see dmesg for the disk, or ask who runs the file server"),
    errno.ESTALE: ("the file server no longer knows the file", "check that it is mounted and works (ls the folder)"),
    errno.ETIMEDOUT: ("the file server does not answer in time", "check that it is mounted and works (ls the folder)"),
    errno.EMFILE: ("this process has too many files open", "raise its limit: ulimit -n 4096"),
    errno.ENFILE: ("this machine has too many files open", "end other programs, or raise sysctl fs.file-max"),
    errno.EAGAIN: ("the system gives this process no more threads", "end other programs, or raise ulimit -u"),
    errno.ENOMEM: ("there is too little memory", "end other programs, or set fewer workers or a smaller batch_rows"),
    errno.EFBIG: ("a file is larger than this process may write", "raise its limit: ulimit -f unlimited"),
    errno.EACCES: ("permission denied", "chmod or chown it, or set dataset.root to one of your folders"),
    errno.EPERM: ("operation not permitted", "chown it, or set dataset.root to one of your folders"),
}  # fmt: skip
#: Errors of a whole file system: the message names it.
_ON_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
#: Characters of a library's message that are repeated in ours.
_SAID = 300


def sort_of(error: BaseException) -> Sort | None:
    """The sort of an error of the machine, or of the error that it was raised from; None for any other error."""
    return next((sort for each in _chain(error) if (sort := _sort_of_one(each)) is not None), None)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error says nothing about the row or shard being processed: the same work may succeed later."""
    return sort_of(error) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or a device has no memory left."""
    return sort_of(error) is Sort.MEMORY


def asked_again(work: Callable[[], T]) -> T:
    """Calls `work`, and calls it a second time if a disk or a server did not answer."""
    try:
        return work()
    except Exception as error:
        if sort_of(error) is not Sort.ACCESS:
            raise
    time.sleep(PAUSE_S)
    return work()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, the error it was raised from, and so on."""
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
    """The sort of an error whose library gives the system's text without the errno value."""
    return Sort.SHORTAGE if any(os.strerror(number) in text for number in _SHORTAGE) else None


def explained(error: BaseException) -> TransientError:
    """An error as a MachineError: what happened, where, and what to do about it.

    Any OSError is accepted, not only those that `sort_of` recognizes. A TransientError that no error of the machine has
    caused already says all of this, and is returned as it is.
    """
    cause = next((each for each in _chain(error) if _sort_of_one(each)), error)
    if isinstance(cause, TransientError):
        return cause
    number = _number_of(cause)
    text = strerror(cause) if isinstance(cause, OSError) else _said(cause)
    what, fix = _IN_WORDS.get(number, (text, "look at the file that this message names, and with dmesg and df"))
    where: dict[str, object] = {}
    if isinstance(cause, OSError) and cause.filename is not None:
        where["file"] = cause.filename
        if number in _ON_DISK:
            where["file system"] = file_system(Path(os.fsdecode(cause.filename)).parent)
    if isinstance(cause, ReadError):
        where["where in it"] = str(cause).partition(" of the file")[0]
    if not isinstance(cause, OSError) and str(cause) and what != _said(cause):
        where["said"] = _said(cause)
    result = MachineError(what, where=where, fix=f"{fix}; then run the same command again: what is committed is kept")
    result.sort = _sort_of_one(cause)
    return result


def _number_of(error: BaseException) -> int:
    """The errno value of an error, 0 if it has none."""
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
