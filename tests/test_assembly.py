"""Files made in the background: every part arrives once and in order, whatever the kernel does of a call."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from builder.errors import ShardError
from builder.hybrid import assembly
from builder.hybrid.assembly import Assembly

Writev = Callable[[int, Sequence[Any]], int]
SOURCE = random.Random(5).randbytes(300_000)
BATCH = 20_000


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "_BATCH", BATCH)
    monkeypatch.setattr(assembly, "_SYNCED", 3 * BATCH)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(SOURCE)
    return tmp_path / "source"


def steps(seed: int) -> list[list[bytes] | tuple[int, int]]:
    """New bytes and ascending ranges of the source: empty, small, larger than a batch, far apart."""
    chance = random.Random(seed)
    found: list[list[bytes] | tuple[int, int]] = []
    at = 0
    while at < len(SOURCE):
        size = chance.choice((0, 1, 511, 4096, 6000, BATCH, 3 * BATCH))
        end = min(at + size, len(SOURCE))
        found.append((at, end))
        found.append([chance.randbytes(chance.choice((0, 1, 700, BATCH + 3))) for _ in range(chance.randrange(4))])
        at = end + chance.choice((0, 1, 512, 3 * BATCH))
    return found


def assembled(source: Path, parts: Sequence[list[bytes] | tuple[int, int]]) -> tuple[bytes, int]:
    """The new file, with what the assembly says of its size."""
    target = source.with_name("target")
    with source.open("rb") as old, target.open("wb", buffering=0) as new:
        with Assembly(old.fileno(), new.fileno()) as made:
            for part in parts:
                if isinstance(part, tuple):
                    made.copy(*part)
                else:
                    made.add(part)
        return target.read_bytes(), made.size


def expected(parts: Sequence[list[bytes] | tuple[int, int]]) -> tuple[bytes, int]:
    whole = b"".join(SOURCE[slice(*part)] if isinstance(part, tuple) else b"".join(part) for part in parts)
    return whole, len(whole)


def cut_short(real: Writev, *, raising: int | None) -> Writev:
    """A `writev` that writes 1,000 bytes of each call, and then says so or fails."""

    def writev(target: int, parts: Sequence[Any]) -> int:
        done = real(target, [b"".join(parts)[:1000]])
        if raising is not None:
            raise OSError(raising, os.strerror(raising))
        return done

    return writev


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kernel", ["writes all", "writes a little", "faults"])
def test_every_part_arrives_once_and_in_order(
    source: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, seed: int
) -> None:
    if kernel != "writes all":
        raising = errno.EFAULT if kernel == "faults" else None
        monkeypatch.setattr(os, "writev", cut_short(os.writev, raising=raising))
    assert assembled(source, steps(seed)) == expected(steps(seed))


def test_nothing_at_all(source: Path) -> None:
    assert assembled(source, []) == (b"", 0)


def test_more_parts_than_one_call_takes(source: Path) -> None:
    parts: list[list[bytes] | tuple[int, int]] = [(0, 100), [bytes([i % 251]) for i in range(3000)], (200, 300)]
    assert assembled(source, parts) == expected(parts)
    thin: list[list[bytes] | tuple[int, int]] = [(start, start + 1) for start in range(0, 20_000, 2)]
    assert assembled(source, thin) == expected(thin)


def test_a_file_system_without_mappings(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(assembly.mmap, "mmap", refuse)
    assert assembled(source, steps(3)) == expected(steps(3))


def test_memory_is_bounded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int] = []
    batches: list[int] = []
    real, writev = assembly.mmap.mmap, os.writev

    def mapped(descriptor: int, length: int, *arguments: Any, **options: Any) -> Any:
        windows.append(length)
        return real(descriptor, length, *arguments, **options)

    def counted(target: int, parts: Sequence[Any]) -> int:
        batches.append(sum(len(part) for part in parts))
        return writev(target, parts)

    monkeypatch.setattr(assembly.mmap, "mmap", mapped)
    monkeypatch.setattr(os, "writev", counted)
    sparse = [(start, start + 1500) for start in range(0, len(SOURCE) - 1500, 5000)]
    assert assembled(source, sparse) == expected(sparse)
    many = [part for start in range(0, 200_000, 1000) for part in ((start, start + 700), [b"x" * 300])]
    assert assembled(source, many) == expected(many)
    assert len(windows) > 10 and max(windows) < 2 * BATCH + 4096
    assert len(batches) > 10 and max(batches) < BATCH + 1000


def test_ranges_in_any_order(source: Path) -> None:
    chance = random.Random(2)
    parts = [(start, start + 900) for start in range(0, 290_000, 1000)]
    chance.shuffle(parts)
    assert assembled(source, parts) == expected(parts)
    back = [(0, 900), (8000, 8900), (1000, 1900), (1900, 2000)]
    assert assembled(source, back) == expected(back)


def test_what_lies_between_ranges_far_apart_is_not_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("mapped")

    monkeypatch.setattr(assembly.mmap, "mmap", refuse)
    parts = [(start, start + 200) for start in range(0, 290_000, 1000)]
    assert assembled(source, parts) == expected(parts)


def test_a_source_that_is_cut_before_it_is_mapped(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        found = real(descriptor, size, offset)
        os.truncate(source, 4096)
        return found

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(ShardError) as refused:
        assembled(source, [(0, 5000), (6000, 12_000)])
    assert str(refused.value) == "the file ends at byte 4096, inside a range that goes to 5000"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_target_is_not_lost(source: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    real, errors = os.writev, [error]

    def writev(target: int, parts: Sequence[Any]) -> int:
        if errors:
            raise OSError(errors.pop(), "once")
        return real(target, parts)

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(OSError, match="once") as told:
        assembled(source, [(0, 5000), [b"new"], (6000, 12_000)])
    assert told.value.errno == error


def test_no_descriptor_to_be_had(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, given = os.dup, []

    def dup(descriptor: int) -> int:
        if given:
            raise OSError(errno.EMFILE, "Too many open files")
        given.append(real(descriptor))
        return given[0]

    monkeypatch.setattr(os, "dup", dup)
    with pytest.raises(OSError, match="Too many open files"):
        assembled(source, [(0, 5000)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(given[0])


def test_no_thread_to_be_had(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="no thread can be started"):
        assembled(source, [(0, 5000), [b"new"]])


def test_a_thread_that_outlives_its_maker_writes_nowhere_else(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, began, go = os.writev, threading.Event(), threading.Event()

    def writev(target: int, parts: Sequence[Any]) -> int:
        began.set()
        go.wait(10)
        return real(target, [b"".join(parts)[:1000]])

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "writev", writev)
    new = source.with_name("target").open("wb", buffering=0)
    with source.open("rb") as old, pytest.raises(KeyboardInterrupt):
        made = Assembly(old.fileno(), new.fileno())
        with made:
            made.add([b"new" * 1000, b"new" * 1000])
            made.flush()
            began.wait(10)
            monkeypatch.setattr(made._pool, "shutdown", interrupted)
            raise ValueError
    new.close()
    with source.with_name("another").open("w+b") as another:
        go.set()
        assert made._writing is not None
        made._writing.result(10)
        assert another.read() == b""
    assert source.with_name("target").read_bytes() == b"new" * 2000


def test_a_source_that_is_cut_meanwhile(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def writev(target: int, parts: Sequence[Any]) -> int:
        os.truncate(source, 4096)
        return real(target, parts)

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(ShardError) as refused:
        assembled(source, [[b"new"], (0, 5000), [b"new"], (6000, 12_000)])
    assert str(refused.value) == "the file ends at byte 4096, inside a range that goes to 5000"


def test_a_disk_that_is_full_ends_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def writev(target: int, parts: Sequence[Any]) -> int:
        calls.append(len(parts))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", writev)
    many = [part for start in range(0, 200_000, 1000) for part in ((start, start + 700), [b"x" * 300])]
    with pytest.raises(OSError, match="No space left"):
        assembled(source, many)
    assert len(calls) == 1


def test_a_sync_that_fails_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        assembled(source, [(0, 200_000), (200_000, 250_000)])


def test_a_sync_that_fails_is_told_though_a_later_one_does_not(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(assembly, "_SYNCED", 1000)
    with pytest.raises(OSError, match="Input/output error"):
        assembled(source, [(start, start + 900) for start in range(0, 250_000, 1000)] * 20)


def test_an_error_of_its_maker_ends_its_threads(source: Path) -> None:
    with source.open("rb") as old, source.with_name("target").open("wb", buffering=0) as new:
        with pytest.raises(ValueError, match="bad sample"), Assembly(old.fileno(), new.fileno()) as made:
            made.copy(0, 100_000)
            made.add([b"new"])
            raise ValueError("bad sample")
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("assembly")]
        assert new.tell() == 100_000
