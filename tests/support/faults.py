"""Every call through which a process changes or reads files below a folder: counted, killed at, or made to fail.

Python's calls are wrapped (`os.link`, `os.fsync`, the raw writes of every file opened for writing ...), and the parquet
writer, which writes in C++, at its `close`. A process of the command line is armed by its environment, see `site`.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from builder.executors.base import PARENT_PIPE

#: Kinds of points; `read` is one at an offset, `create` a file opened for writing, `parquet` one that is finished.
KINDS = ("read", "create", "write", "parquet", "fsync", "link", "rename", "unlink", "mkdir")
#: Kinds that can be struck in the middle of their bytes.
HALVES = ("write", "parquet")
#: Kinds of points that read: a file opened, bytes read, a parquet file opened or read, a mapping.
READS = ("open", "read", "parquet_read", "map")
#: The environment variable that arms a process, see `site`.
VARIABLE = "BUILDER_TEST_FAULT"
_TEMP = re.compile(r"\.([^/]*)@[^/@]+-\d+-[0-9a-f]{8}\.tmp")
_RUN = re.compile(r"\d{8}T\d{6}-(\w+)-[0-9a-f]{4}(-[0-9a-f]{6})?")


@dataclass(frozen=True)
class Point:
    """One call: its kind, and the path below the folder without what differs from run to run."""

    kind: str
    path: str


@dataclass
class Fault:
    """Where to strike, and how.

    Attributes:
        folder: calls on paths below it are points.
        kinds: kinds that count.
        path: only points whose path, as `Point` has it, matches this regular expression.
        nth: which of these points, from 0; None only counts.
        times: how many points in a row are struck; 0: all that follow.
        when: before the call, after it, or `half`: after half of its bytes.
        errno: the error that is raised; 0 kills the process.
        parent: with a worker, the command that started it is killed too.
    """

    folder: str
    kinds: tuple[str, ...] = KINDS
    path: str = ""
    nth: int | None = 0
    times: int = 1
    when: str = "before"
    errno: int = 0
    parent: bool = False
    #: The points that were passed.
    passed: list[Point] = field(default_factory=list)

    def here(self, kind: str, path: str) -> bool:
        """Notes a point; returns whether it is to be struck."""
        if kind not in self.kinds or not path.startswith(self.folder + "/"):
            return False
        plain = _RUN.sub(r"RUN-\1", _TEMP.sub(r".\1.tmp", path[len(self.folder) + 1 :]))
        if not re.search(self.path, plain):
            return False
        self.passed.append(Point(kind, plain))
        if self.nth is None:
            return False
        over = len(self.passed) - 1 - self.nth
        return over >= 0 and (self.times == 0 or over < self.times)

    def strike(self, path: str = "") -> None:
        """Kills, or raises as the system does: with the path where the call was given one."""
        if self.errno:
            raise OSError(self.errno, os.strerror(self.errno), *([path] if path else []))
        if self.parent and os.environ.get(PARENT_PIPE) == "1":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def armed(fault: Fault) -> Iterator[Fault]:
    """This process with its calls wrapped, until the end of the block."""
    replaced = arm(fault)
    try:
        yield fault
    finally:
        for owner, name, real in replaced:
            setattr(owner, name, real)


def arm(fault: Fault) -> list[tuple[Any, str, Any]]:
    """Wraps the calls of this process; returns what was there before: owner, name, function."""
    import mmap

    import pyarrow.parquet as pq

    wrapped: list[tuple[Any, str, Any]] = [
        (os, name, _call(fault, kind, name, getattr(os, name)))
        for kind, names in _CALLS.items()
        for name in names
        if hasattr(os, name)
    ]
    opened = _opener(fault, io.open)
    wrapped += [(io, "open", opened), (builtins, "open", opened), (os, "open", _os_open(fault, os.open))]
    wrapped.append((pq.ParquetWriter, "close", _parquet_close(fault, pq.ParquetWriter.close)))
    for owner, name in ((pq.ParquetFile, "__init__"), (pq.ParquetFile, "read"), (pq, "read_schema")):
        wrapped.append((owner, name, _parquet_read(fault, getattr(owner, name), owner is pq)))
    wrapped.append((mmap, "mmap", _map(fault, mmap.mmap)))
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    for owner, name, function in wrapped:
        setattr(owner, name, function)
    return replaced


#: Functions of `os` by kind.
_CALLS = {
    "read": ("pread", "preadv"),
    "write": ("write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range", "posix_fallocate", "ftruncate"),
    "fsync": ("fsync", "fdatasync"),
    "link": ("link", "symlink"),
    "rename": ("rename", "replace"),
    "unlink": ("unlink", "remove", "rmdir"),
    "mkdir": ("mkdir",),
}


def _call(fault: Fault, kind: str, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        path, given = _path_of(kind, name, arguments, options)
        if not fault.here(kind, path):
            return real(*arguments, **options)
        if fault.when == "before":
            fault.strike(given)
        if fault.when == "half" and (part := _half(name, arguments)) is not None:
            real(*part, **options)
            fault.strike(given)
        try:
            result = real(*arguments, **options)
        except OSError:
            fault.strike(given)  # after a call that fails, as that of a file that is not there
            raise
        fault.strike(given)
        return result

    return call


def _path_of(kind: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, str]:
    """The path that a call changes, and as the system names it in an error: calls on a descriptor name none."""
    if kind in ("read", "write", "fsync"):
        return _of(arguments[1] if name == "copy_file_range" else arguments[0]), ""
    given = os.fspath(arguments[1] if kind in ("link", "rename") else arguments[0])
    folder = options.get("dir_fd")
    return (f"{_of(folder)}/{given}" if folder is not None else os.path.abspath(given)), given  # noqa: PTH100


def _of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError:
        return ""


def _half(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments of a call that writes half of its bytes; None for a call that writes none."""
    if name in ("write", "pwrite"):
        descriptor, data, *rest = arguments
        return (descriptor, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2], *rest)
    if name in ("writev", "pwritev"):
        descriptor, parts, *rest = arguments
        data = b"".join(parts)
        return (descriptor, [data[: len(data) // 2]], *rest)
    if name == "sendfile":
        return (*arguments[:3], arguments[3] // 2)
    if name == "copy_file_range":
        return (*arguments[:2], arguments[2] // 2, *arguments[3:])
    return None


def _opener(fault: Fault, real: Callable[..., Any]) -> Callable[..., Any]:
    """`open` whose files write through `Raw`, below the buffer, where the system is asked."""

    class Reading(io.FileIO):
        def _strike(self) -> None:
            if fault.here("read", _of(self.fileno())):
                fault.strike()

        def readinto(self, buffer: Any) -> int | None:
            self._strike()
            return super().readinto(buffer)

        def readall(self) -> bytes:
            self._strike()
            return super().readall()

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            if not fault.here("write", _of(self.fileno())):
                return super().write(data) or 0
            view = memoryview(data).cast("B")
            if fault.when == "before":
                fault.strike()
            if fault.when == "half":
                super().write(view[: len(view) // 2])
                fault.strike()
            count = super().write(data) or 0
            fault.strike()
            return count

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        is_path = isinstance(file, str | os.PathLike)
        path = os.path.abspath(os.fspath(file)) if is_path else ""  # noqa: PTH100
        is_below = path.startswith(fault.folder + "/")
        if is_below and not set(mode) & set("wax+") and set(READS) & set(fault.kinds):
            if fault.here("open", path):
                fault.strike(path)
            plain = Reading(path, "r", opener=opener)
            if buffering == 0:
                return plain
            buffer = io.BufferedReader(plain)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding or "utf-8", errors, newline)
        if not is_below or not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        hit = fault.here("create", path)
        if hit and fault.when != "after":
            fault.strike(path)
        raw = Raw(path, mode.replace("b", "").replace("t", ""), opener=opener)
        if hit:
            raw.close()
            fault.strike(path)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)

    return opened


def _os_open(fault: Fault, real: Callable[..., int]) -> Callable[..., int]:
    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        is_made = bool(flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        hit = fault.here("create" if is_made else "open", os.path.abspath(os.fspath(path)))  # noqa: PTH100
        if hit and fault.when != "after":
            fault.strike(os.fspath(path))
        descriptor = real(path, flags, *arguments, **options)
        if hit:
            os.close(descriptor)
            fault.strike(os.fspath(path))
        return descriptor

    return opened


def _parquet_read(fault: Fault, real: Callable[..., Any], is_function: bool) -> Callable[..., Any]:
    """Opening or reading a parquet file, which is done in C++."""

    def call(*arguments: Any, **options: Any) -> Any:
        place = arguments[0] if is_function else arguments[1] if len(arguments) > 1 else ""
        path = getattr(arguments[0], "tested_path", "") if not is_function else ""
        if isinstance(place, str | os.PathLike):
            path = os.path.abspath(os.fspath(place)) if str(place) else path  # noqa: PTH100
        if not is_function and path:
            arguments[0].tested_path = path
        if path and fault.here("parquet_read", path):
            fault.strike(path)
        return real(*arguments, **options)

    return call


def _map(fault: Fault, real: Any) -> Any:
    def call(descriptor: int, *arguments: Any, **options: Any) -> Any:
        if fault.here("map", _of(descriptor)):
            fault.strike()
        return real(descriptor, *arguments, **options)

    return call


def _parquet_close(fault: Fault, real: Callable[..., None]) -> Callable[..., None]:
    def close(writer: Any) -> None:
        place = writer.where if isinstance(getattr(writer, "where", None), str | os.PathLike) else ""
        path = os.path.abspath(os.fspath(place)) if place else ""  # noqa: PTH100
        if not writer.is_open or not fault.here("parquet", path):
            real(writer)
            return
        if fault.when == "before" and fault.errno == 0:
            fault.strike()
        real(writer)  # a writer that fails has closed its file all the same
        if fault.when == "half":
            os.truncate(path, Path(path).stat().st_size // 2)
        fault.strike()

    return close


# --- processes of the command line ---


def environment(fault: Fault | None, site: Path) -> dict[str, str]:
    """The environment of a command whose Python, and its workers', is armed; `site` is a folder to write to."""
    if fault is None:
        return {}
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(f"import {__name__}\n{__name__}.from_environment()\n")
    places = [str(site), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {VARIABLE: json.dumps(asdict(fault)), "PYTHONPATH": os.pathsep.join(filter(None, places))}


def from_environment() -> None:
    """Arms this process as its environment says."""
    if VARIABLE in os.environ:
        values = json.loads(os.environ[VARIABLE])
        arm(Fault(**{**values, "kinds": tuple(values["kinds"]), "passed": []}))
