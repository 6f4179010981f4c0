"""Atomic and create-only writes, exact reads at offsets, copies of byte ranges.

Owns how bytes reach a disk so that a kill leaves either the old file or the new one. Knows nothing of tars or tables.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from builder.errors import ConfigError, ShardError, TransientError
from builder.store.owners import AskLiveness, is_abandoned

T = TypeVar("T")
#: Folders that were opened as roots, by the path as given: below them, no link is followed to write or delete a file.
_roots: set[tuple[str, ...]] = set()
#: Buffer size for copies that the kernel does not do itself. Larger writes are up to five times slower on a virtual
#: machine that gets its memory from a host on demand: the page cache then requests it in large pieces.
COPY_BUFFER = 64 * 1024
#: Reads up to this size skip the check of the file's length.
_UNCHECKED = 1 << 20
#: Temp files begin with a dot and end in this, never in `.parquet` or `.tar`, so that no reader's glob matches them.
TEMP_SUFFIX = ".tmp"
#: A temp name contains its owner: `.NAME@HOST-PID-8 hex.tmp`.
_TEMP = re.compile(r"\..*@(?P<host>[^@]+)-(?P<pid>\d+)-[0-9a-f]{8}" + re.escape(TEMP_SUFFIX))
#: errno values of a file system without hard links (vfat, exfat, some FUSE and SMB mounts).
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def strerror(error: OSError) -> str:
    """The system's text for an error; pyarrow's errors have a longer text of their own."""
    return os.strerror(error.errno) if error.errno else str(error)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts a path into an OSError that names no file, or a temp file or one in a temp folder, which are soon gone.

    Args:
        path: what a user can find: the file being made, or its folder if it has no name yet.
    """
    try:
        yield
    except OSError as error:
        parts = () if error.filename is None else Path(os.fsdecode(error.filename)).parts
        if not parts or any(map(_TEMP.fullmatch, parts)):
            error.filename, error.filename2 = str(path), None
        raise


def guard(root: Path) -> None:
    """Marks a folder as a root for this process: below it, no link is followed to write, delete or open a file.

    The root itself may be a link, and may lie behind links. `Layout` calls this, so that no writer can forget it.
    """
    _roots.add(root.absolute().parts)


def check_no_link(path: Path) -> Path:
    """Returns `path` if no folder between it and its root is a link; a path outside all roots is not checked.

    The check runs right before the path is used; it does not protect against changes made in between.

    Raises:
        ShardError: a folder is a link, or the path contains `..`.
    """
    parts = path.absolute().parts
    depth = next((length for length in range(1, len(parts)) if parts[:length] in _roots), None)
    if depth is None:
        return path
    if ".." in parts[depth:]:
        raise ShardError("a path leads out of the root", where={"path": path}, fix="name a file of the root")
    for length in range(depth + 1, len(parts)):
        folder = os.path.join(*parts[:length])  # noqa: PTH118 - asked for every file that is written
        if os.path.islink(folder):  # noqa: PTH114
            raise _behind_link(Path(folder), Path(*parts[:depth]))
    return path


def _behind_link(path: Path, root: Path) -> ShardError:
    return ShardError(
        f"'{path}' is a link: nothing in a root is written, deleted or read behind links",
        where={"root": root, "leads to": path.readlink()},
        fix=f"rm {shlex.quote(str(path))}, and move what it led to there if it is yours; dataset.root itself may "
        "be a link, and [write] folder in the pipeline puts the hybrid shards elsewhere",
    )


def open_inside(path: Path, flags: int) -> int:
    """Opens a file of a root without following links; returns its descriptor.

    Raises:
        ShardError: the file is a link, or lies behind one.
    """
    check_no_link(path)
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            check_no_link(path / "inside")  # its error names the root
            raise _behind_link(path, path.parent) from error
        raise


def remove(path: Path) -> None:
    """Deletes a file of a root, or a link in its place; does nothing if it does not exist."""
    check_no_link(path).unlink(missing_ok=True)


#: errno values of `copy_file_range` where it is not supported: across file systems, on old ones, for pipes.
_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def temp_path(path: Path) -> Path:
    """A unique temp name in the folder of `path`, with the name of the file cut to 40 characters."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name[:40]}@{owner}{TEMP_SUFFIX}")


def is_dead_temp(path: Path, liveness: AskLiveness) -> bool:
    """Whether a file is a temp file whose process will not touch it again.

    Args:
        liveness: called with the owner, `{"host": name, "pid": number}`.
    """
    owner = _TEMP.fullmatch(path.name)
    if owner is None:
        return False
    try:
        return is_abandoned(path, liveness({"host": owner["host"], "pid": int(owner["pid"])}))
    except FileNotFoundError:
        return False


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, and makes their names durable."""
    check_no_link(folder / "inside")
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Makes the bytes of a closed file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: bytes | Callable[[Path], object], *, durable: bool = True) -> None:
    """Writes a whole file or none: temp name, fsync, rename, fsync of the folder.

    Args:
        path: the file; an existing one is replaced.
        write: the bytes, or a function that writes them to the path it is given.
        durable: False leaves out both fsyncs, for files that can be made again.
    """
    with naming(path):
        temp = write_temp(path, write, durable=durable)
        try:
            temp.replace(path)
        except OSError:
            temp.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)


def open_log(path: Path) -> BinaryIO:
    """Opens a log of a root for appending; creates its folder if needed."""
    check_no_link(path).parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(open_inside(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def append_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    """Appends values to a log, one json object per line, without fsync."""
    if values:
        lines = (json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values)
        with naming(path), open_log(path) as log:
            log.writelines(line.encode() for line in lines)


def create_only(path: Path, write: bytes | Callable[[Path], object]) -> bool:
    """Writes a new file durably; returns False, and changes nothing, if the name is taken.

    A link fails if the name exists, on local disks and on NFS. If it fails and both names have the same inode, the link
    was made and only the reply was lost.
    """
    with naming(path):
        temp = write_temp(path, write)
        try:
            try:
                os.link(temp, path)
            except FileExistsError:
                if not _same_inode(temp, path):
                    return False
            except OSError:
                if not _same_inode(temp, path):
                    raise
            sync_folder(path.parent)
            return True
        finally:
            temp.unlink(missing_ok=True)


def write_temp(path: Path, write: bytes | Callable[[Path], object], *, durable: bool = True) -> Path:
    """Writes a whole file under a temp name next to `path`, creating the folder; the caller renames it."""
    make_folder(path.parent)
    temp = temp_path(path)
    with naming(path):
        try:
            if callable(write):
                write(temp)
            else:
                temp.write_bytes(write)
            if durable:
                sync_file(temp)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
    return temp


def _same_inode(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(one.stat(), other.stat())
    except FileNotFoundError:
        return False


def check_links(folder: Path) -> None:
    """Tries one hard link in a folder, since commits depend on them.

    Raises:
        ConfigError: the file system has no hard links.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = temp_path(folder / "link-probe")
    linked = temp_path(folder / "link-probe")
    try:
        with naming(folder):
            probe.touch()
            os.link(probe, linked)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise ConfigError(
            f"the file system of '{folder}' has no hard links, which every commit needs",
            where={"file system": file_system(folder), "answer": os.strerror(error.errno or 0)},
            fix="set dataset.root to a folder on a local disk, NFS, Lustre or GPFS",
        ) from error
    finally:
        probe.unlink(missing_ok=True)
        linked.unlink(missing_ok=True)


def file_system(folder: Path) -> str:
    """The type and mount point of a folder's file system, from /proc/mounts; 'unknown' on systems without it."""
    best = ("", "unknown")
    try:
        mounts = Path("/proc/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return "unknown"
    resolved = str(folder.resolve())
    for line in mounts:
        _, point, kind = line.split(" ")[:3]
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, f"{kind} at {point}")
    return best[1]


def read_object(path: Path) -> dict[str, Any]:
    """The json object in a file.

    Raises:
        ShardError: the file holds anything else.
        OSError: the file does not exist or cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ShardError(f"'{path.name}' is damaged: it holds no json object", where={"file": path})
    return value


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Reads exactly `size` bytes at an offset.

    Raises:
        ShardError: the file is shorter; no memory is allocated for bytes that it does not have.
        ReadError: the disk does not return the bytes; the error names the file and the byte.
    """
    if offset < 0 or size < 0 or size > _UNCHECKED:
        length = os.fstat(descriptor).st_size
        if offset < 0 or size < 0 or offset + size > length:
            raise _ends(length, offset + size)
    data = b""
    while len(data) < size:
        try:
            more = os.pread(descriptor, size - len(data), offset + len(data))
        except OSError as error:
            raise _unread(descriptor, offset + len(data), error) from error
        if not more:
            raise _ends(offset + len(data), offset + size)
        data = data + more if data else more
    return data


def _ends(length: int, end: int) -> ShardError:
    return ShardError(f"the file ends at byte {length}, inside a range that goes to {end}")


class ReadError(OSError):
    """A disk or file server did not return bytes of a file; `strerror` says which bytes."""

    def __str__(self) -> str:
        return str(self.strerror)


def _unread(descriptor: int, offset: int, error: OSError) -> ReadError:
    return ReadError(error.errno, f"byte {offset} of the file cannot be read: {strerror(error)}", name_of(descriptor))


def name_of(descriptor: int) -> str | None:
    """The path of an open file; None on a system without /proc."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError:
        return None


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copies the bytes [start, end) of one descriptor to the current position of another.

    The kernel does the copy where it can: a fifth less time than reading and writing each piece.

    Raises:
        ShardError: the source ends before `end`.
        ReadError: the disk of the source does not return the bytes.
        OSError: the bytes cannot be written.
    """
    while start < end:
        count = _copied_by_kernel(source, target, start, end - start)
        if count == 0:
            _copy_through(source, target, start, end)
            return
        start += count


def _copied_by_kernel(source: int, target: int, start: int, size: int) -> int:
    """Bytes copied by `copy_file_range`; 0 at the end of the source, or if the file system cannot do it."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, size, start)
    except OSError as error:
        if error.errno not in {*_NO_COPY, errno.EIO}:  # EIO: the copy by hand finds out which side failed
            raise
        return 0


def _copy_through(source: int, target: int, start: int, end: int) -> None:
    buffer = memoryview(bytearray(min(COPY_BUFFER, end - start)))
    while start < end:
        try:
            count = os.preadv(source, [buffer[: min(len(buffer), end - start)]], start)
        except OSError as error:
            raise _unread(source, start, error) from error
        if count == 0:
            raise _ends(start, end)
        write_all(target, buffer[:count])
        start += count


def write_all(target: int, data: bytes | memoryview) -> None:
    """Writes all of `data`, in several calls if the kernel accepts only a part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def gone(error: OSError) -> bool:
    """Whether a file was replaced or swept since it was listed: the caller lists the folder again."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


def retry_listing(read: Callable[[], T], attempts: int = 20) -> T:
    """Runs `read`, which lists and then opens files, and runs it again if a listed file is gone.

    The pauses between the attempts, 1 ms to 1 s, are longer in all than NFS keeps a listing in its cache.

    Raises:
        TransientError: the files changed faster than they could be read, `attempts` times in a row.
    """
    for attempt in range(attempts):
        try:
            return read()
        except OSError as error:
            if not gone(error):
                raise
            last = error
        time.sleep(min(0.001 * 2**attempt, 1.0))
    raise TransientError(
        f"a file was gone {attempts} times when it was to be opened",
        where={"last error": last},
        fix="run the same command again",
    )
