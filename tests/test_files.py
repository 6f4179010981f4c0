"""Writes that leave the old file or the new one, names that say whose a temp file is, exact reads and copies."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.errors import ConfigError, ShardError, TransientError
from builder.executors.by_name import liveness_of
from builder.store import files
from builder.store.owners import Liveness, process_liveness
from builder.table.column_files import renew_listing


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dead_pid() -> int:
    """The number of a process that has ended and was waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_write_atomic_replaces_the_file_and_leaves_no_temp(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "new/folder/file", b"one")
    files.write_atomic(tmp_path / "new/folder/file", lambda temp: temp.write_bytes(b"two"))
    with (tmp_path / "new/folder/file").open("rb") as reader:
        files.write_atomic(tmp_path / "new/folder/file", b"three")
        assert reader.read() == b"two"  # a reader has the old file or the new one, never some of each
    assert everything(tmp_path) == {"new/folder/file": b"three"}


def test_write_atomic_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "file", b"old")

    def write(temp: Path) -> None:
        temp.write_bytes(b"half of it")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        files.write_atomic(tmp_path / "file", write)
    assert everything(tmp_path) == {"file": b"old"}


def test_create_only_leaves_a_file_that_exists_alone(tmp_path: Path) -> None:
    assert files.create_only(tmp_path / "file", b"first") is True
    assert files.create_only(tmp_path / "file", b"second") is False
    assert everything(tmp_path) == {"file": b"first"}


def test_bytes_are_durable_before_their_name_and_the_name_after(tmp_path: Path, disk: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert files.create_only(folder / "file", b"one")
    assert disk == ["fsync TEMP", "link file", "fsync folder/"]
    disk.clear()
    files.write_atomic(folder / "file", lambda temp: temp.write_bytes(b"two"))
    assert disk == ["fsync TEMP", "rename file", "fsync folder/"]
    disk.clear()
    files.write_atomic(folder / "file", b"three", durable=False)
    assert disk == ["rename file"]


def test_new_folders_are_durable_before_what_lies_in_them(tmp_path: Path, disk: list[str]) -> None:
    files.create_only(tmp_path / "one/two/file", b"")
    assert disk == [f"fsync {tmp_path.name}/", "fsync one/", "fsync TEMP", "link file", "fsync two/"]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EIO])
def test_a_link_whose_answer_was_lost_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """NFS sends a request again whose answer was lost: the second one finds the name taken, by itself."""
    link = os.link

    def loses_the_answer(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", loses_the_answer)
    assert files.create_only(tmp_path / "file", b"mine") is True
    assert everything(tmp_path) == {"file": b"mine"}


def test_a_link_that_fails_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left on device"):
        files.create_only(tmp_path / "file", b"mine")
    assert everything(tmp_path) == {}


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_links(tmp_path / "root")

    def vfat(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", vfat)
    with pytest.raises(ConfigError) as refused:
        files.check_links(tmp_path / "root")
    assert str(refused.value) == (
        f"the file system of '{tmp_path}/root' has no hard links, which every commit needs\n"
        f"  file system: {files.file_system(tmp_path)}\n"
        "  answer: Operation not permitted\n"
        "  fix: set dataset.root to a folder on a local disk, NFS, Lustre or GPFS"
    )
    assert everything(tmp_path) == {}


def test_errors_name_what_a_user_can_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a temp file, nor a file in a temp folder."""
    temp = files.temp_path(tmp_path / "run")
    for named in (None, str(temp), str(temp / "run.json"), os.fsencode(temp)):
        with pytest.raises(OSError) as caught, files.naming(tmp_path):
            raise OSError(errno.ENOSPC, "full", named)
        assert (caught.value.filename, caught.value.filename2) == (str(tmp_path), None)
    with pytest.raises(OSError) as caught, files.naming(tmp_path):
        raise OSError(errno.ENOSPC, "full", "mine.tmp/a.tar")
    assert caught.value.filename == "mine.tmp/a.tar"

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "full", str(path))

    monkeypatch.setattr(Path, "touch", full)
    for probe in (files.check_links, renew_listing):
        with pytest.raises(OSError) as caught:
            probe(tmp_path)
        assert caught.value.filename == str(tmp_path)


def test_file_system_names_type_and_mount_point() -> None:
    assert files.file_system(Path("/proc/self")) == "proc at /proc"


def test_temp_names_are_unique_and_fit(tmp_path: Path) -> None:
    long = tmp_path / ("ü" * 120 + ".parquet")
    names = {files.temp_path(long) for _ in range(50)}
    assert len(names) == 50
    for path in names:
        path.touch()
        assert path.name.startswith(".")
        assert path.name.endswith(".tmp")
        assert not files.is_dead_temp(path, liveness_of)


def test_a_temp_file_is_dead_with_its_process(tmp_path: Path) -> None:
    here, dead = socket.gethostname(), dead_pid()
    expected = {
        f".a.parquet@{here}-{dead}-0123abcd.tmp": True,
        f".a.parquet@{here}-{os.getpid()}-0123abcd.tmp": False,
        f".a@b@{here}-{dead}-0123abcd.tmp": True,
        f".a.parquet@elsewhere-{dead}-0123abcd.tmp": False,
        f".a.parquet@{here}-{dead}-0123abcd.tmp.parquet": False,
        f"a.parquet@{here}-{dead}-0123abcd.tmp": False,
        ".vimrc.tmp": False,
    }
    for name in expected:
        (tmp_path / name).touch()
    assert {name: files.is_dead_temp(tmp_path / name, liveness_of) for name in expected} == expected


def test_a_temp_file_of_another_host_is_left_alone_for_two_days(tmp_path: Path) -> None:
    path = tmp_path / ".a.parquet@else-where.example-17-0123abcd.tmp"
    path.touch()
    for hours, is_dead in ((47, False), (49, True)):
        then = time.time() - hours * 3600
        os.utime(path, (then, then))
        assert files.is_dead_temp(path, liveness_of) is is_dead
    path.unlink()
    assert files.is_dead_temp(path, liveness_of) is False


def test_read_at_reads_exactly_or_says_where_the_file_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert files.read_at(descriptor, 3, 4) == b"3456"
        assert files.read_at(descriptor, 10, 0) == b""
        with pytest.raises(ShardError) as refused:
            files.read_at(descriptor, 8, 5)
    finally:
        os.close(descriptor)
    assert str(refused.value) == "the file ends at byte 10, inside a range that goes to 13"


@pytest.mark.parametrize("kernel", ["copies", "refuses", "cannot"])
def test_copy_range_copies_exactly_or_says_where_the_source_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if kernel == "refuses":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    elif kernel == "cannot":
        monkeypatch.delattr(os, "copy_file_range")
    data = os.urandom(3 * files.COPY_BUFFER + 17)
    (tmp_path / "source").write_bytes(data)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_WRONLY | os.O_CREAT)
    try:
        files.copy_range(source, target, 5, len(data))
        files.copy_range(source, target, 0, 5)
        with pytest.raises(ShardError) as refused:
            files.copy_range(source, target, 0, len(data) + 1)
    finally:
        os.close(source)
        os.close(target)
    assert (tmp_path / "target").read_bytes()[: len(data)] == data[5:] + data[:5]
    assert str(refused.value) == f"the file ends at byte {len(data)}, inside a range that goes to {len(data) + 1}"


def test_a_file_that_is_gone_means_listing_anew() -> None:
    answers: list[OSError | str] = [FileNotFoundError(2, "gone"), OSError(errno.ESTALE, "stale"), "read"]

    def read() -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert files.retry_listing(read) == "read"


def test_other_errors_are_not_retried_and_gone_files_not_for_ever() -> None:
    calls = []

    def read(number: int) -> None:
        calls.append(number)
        raise OSError(number, os.strerror(number), "a.parquet")

    with pytest.raises(PermissionError):
        files.retry_listing(lambda: read(errno.EACCES))
    assert calls == [errno.EACCES]
    with pytest.raises(TransientError) as told:
        files.retry_listing(lambda: read(errno.ENOENT), attempts=3)
    assert str(told.value) == (
        "a file was gone 3 times when it was to be opened\n"
        "  last error: [Errno 2] No such file or directory: 'a.parquet'\n"
        "  fix: run the same command again"
    )
    assert calls[1:] == [errno.ENOENT] * 3


def test_a_process_that_ended_and_was_not_asked_how_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        deadline = time.monotonic() + 30
        while process_liveness(socket.gethostname(), process.pid) is not Liveness.DEAD:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, 0)  # its number is still taken
    finally:
        process.wait()
    assert process_liveness(socket.gethostname(), os.getpid()) is Liveness.LIVES
