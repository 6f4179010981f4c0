"""Disks and processes that fail: the message says what, where and what to do; the rest is done; the next run ends it.

The faults are the system's own where that needs no privileges (limits of files and of their size, SIGSEGV, a file that
is deleted); the others are raised by the call itself, see tests/support/faults.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder import machine
from builder.engine import worker
from builder.errors import TransientError
from builder.executors.base import Ended, run_to_end
from builder.executors.local import TaskPool
from builder.hybrid import splice
from builder.sources.tars import shards
from builder.store import files
from builder.store.layout import Layout
from builder.table import column_files, commits, root_schema
from builder.table.edits import EditsTar
from builder.table.query import Samples
from builder.table.sql_text import Sql
from builder.tar import indexing
from conftest import Done, Workspace, ingest_here, samples, talk, write_tar
from support.faults import Fault, armed, environment
from support.planned import SQL, section
from support.stages import Note, Options

Make = Callable[..., Workspace]
ROWS = 4


def key(number: int) -> str:
    return f"{number:032x}-0"


@pytest.fixture
def own(workspace: Make) -> Callable[..., Workspace]:
    """Three ingested shards of four samples, and a stage of tests/support/stages.py."""

    def make(kind: str = "Note", *, shards: int = 3, ingested: bool = True, **options: Any) -> Workspace:
        made = workspace(
            {f"{i:08d}": samples(ROWS, start=i * ROWS) for i in range(shards)},
            stages=section(kind, **options) + "\n[stages.note.run]\nbatch_rows = 2\n" + GENERATE,
            checkpoint_rows=2,
        )
        (made.folder / "note.sql").write_text(SQL)
        (made.folder / "generate.sql").write_text(PROMPTS)
        (made.folder / "write.sql").write_text(WRITE)
        if ingested:
            ingest_here(made.load())
        return made

    return make


GENERATE = """
[stages.generate]
sql = "generate.sql"
width = 64
height = 64

[write]
select = "write.sql"
"""
PROMPTS = "select shard, row, uid, key, caption as prompt, 0 as draw from samples where row > 0"
WRITE = "select shard, row, uid, 'a new caption' as caption from samples where row = 1"


def place(made: Workspace, file: str) -> list[str]:
    """The lines of a message on a disk that say where."""
    return [f"  file: {made.root}/{file}", f"  file system: {files.file_system(made.root)}"]


def count(made: Workspace, condition: str) -> int:
    return int(made.rows(f"select count(*) from samples where {condition}")[0][0])


def temps(made: Workspace) -> list[Path]:
    return list(made.root.rglob("*.tmp"))


GO_ON = "then run the same command again: what is committed is kept"
FULL = ["the disk is full", f"  fix: free some space, or set dataset.root to another disk; {GO_ON}"]
BROKEN = [
    "the disk has an input/output error",
    f"  fix: see dmesg for the disk, or ask who runs the file server; {GO_ON}",
]  # fmt: skip


# --- what is said ---


@pytest.mark.parametrize(
    ("number", "what", "fix"),
    [
        (errno.ENOSPC, "the disk is full", "free some space, or set dataset.root to another disk"),
        (errno.EDQUOT, "the disk quota is used up", "delete some of your files there, or ask for more"),
        (errno.EROFS, "the file system is read-only", "mount it writable, or set dataset.root to a folder that is"),
        (
            errno.EIO,
            "the disk has an input/output error",
            "see dmesg for the disk, or ask who runs the file server",
        ),
        (errno.EMFILE, "this process has too many files open", "raise its limit: ulimit -n 4096"),
        (errno.ENFILE, "this machine has too many files open", "end other programs, or raise sysctl fs.file-max"),
        (errno.EFBIG, "a file is larger than this process may write", "raise its limit: ulimit -f unlimited"),
        (errno.EACCES, "permission denied", "chmod or chown it, or set dataset.root to one of your folders"),
        (errno.EISDIR, "Is a directory", "look at the file that this message names, and with dmesg and df"),
    ],
)
def test_every_answer_of_the_system_has_words_and_a_fix(tmp_path: Path, number: int, what: str, fix: str) -> None:
    on_disk = number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    system = f"\n  file system: {files.file_system(tmp_path)}" if on_disk else ""
    assert str(machine.explained(OSError(number, "detail of a library", str(tmp_path / "a")))) == (
        f"{what}\n  file: {tmp_path}/a{system}\n  fix: {fix}; {GO_ON}"
    )
    assert str(machine.explained(OSError(number, ""))) == f"{what}\n  fix: {fix}; {GO_ON}"


def test_an_error_names_the_file_and_not_its_temp_file(tmp_path: Path) -> None:
    for fault in (
        Fault(str(tmp_path), ("write",), errno=errno.ENOSPC),  # calls on descriptors name no file
        Fault(str(tmp_path), ("fsync",), errno=errno.EIO),
        Fault(str(tmp_path), ("rename",), errno=errno.EIO),
    ):
        with armed(fault), pytest.raises(OSError) as raised:
            files.write_atomic(tmp_path / "file", b"bytes")
        assert (raised.value.errno, raised.value.filename) == (fault.errno, str(tmp_path / "file"))
        assert list(tmp_path.iterdir()) == []


# --- a full disk, a disk that fails ---


@pytest.mark.parametrize(
    ("kind", "when", "number", "said"),
    [
        ("parquet", "half", errno.ENOSPC, FULL),
        ("fsync", "before", errno.EIO, BROKEN),
        ("link", "before", errno.ENOSPC, FULL),
    ],
)
def test_a_commit_that_fails_leaves_its_shard_and_the_others_go_on(
    own: Callable[..., Workspace], ask: Callable[..., Done], kind: str, when: str, number: int, said: list[str]
) -> None:
    """The second checkpoint of the second shard: the first one is kept."""
    made = own()
    fault = Fault(str(made.root), (kind,), r"columns/00000001/\.?note.g000002", when=when, errno=number)
    with armed(fault):
        done = ask(made, "stage", "note")
    what, fix = said
    assert (done.code, done.talk) == (1, [
        "note: 10 rows, 10 ok",
        f"left shard '00000001' as it is: {what}", *place(made, "columns/00000001/note.g000002.parquet"), fix,
    ])  # fmt: skip
    assert temps(made) == []
    assert ask(made, "status").code == 0  # which folds the checkpoint that was committed
    assert count(made, "note is not null") == 10
    assert ask(made, "stage", "note") == Done(0, "", ["note: 2 rows, 2 ok"])
    assert count(made, "note = 'seen: ' || caption") == 12


def test_a_disk_that_stays_full_stops_a_task_after_three_shards(
    own: Callable[..., Workspace], ask: Callable[..., Done]
) -> None:
    """What was committed before is there; nobody computes for hours what cannot be kept."""
    made = own(shards=6, log='"seen.log"')
    fault = Fault(str(made.root), ("parquet",), "columns/0000000[1-9]/.note", times=0, errno=errno.ENOSPC)
    with armed(fault):
        done = ask(made, "stage", "note")
    [run] = made.root.glob("runs/*")
    what, fix = FULL
    assert (done.code, done.talk[-6:]) == (1, [
        f"error: {what}", *place(made, "columns/00000003/note.g000001.parquet"), "  shards in a row: 3",
        f"  log: {run}/logs/00000.log", fix,
    ])  # fmt: skip
    assert len((made.folder / "seen.log").read_text().split()) == 4 + 3 * 2
    assert (temps(made), count(made, "note is not null")) == ([], 4)
    assert ask(made, "stage", "note").talk == ["note: 20 rows, 20 ok"]


@pytest.mark.parametrize("when", ["before", "half"])
def test_a_full_disk_inside_an_edits_tar(own: Callable[..., Workspace], ask: Callable[..., Done], when: str) -> None:
    made = own()
    fault = Fault(str(made.root), ("write",), "edits/00000001/", nth=1, times=0, when=when, errno=errno.ENOSPC)
    with armed(fault):
        done = ask(made, "stage", "generate")
    [tar] = {point.path for point in fault.passed}
    name = next(line for line in done.talk if line.startswith("  file: ")).rpartition("/")[2]
    what, fix = FULL
    assert tar.startswith("edits/00000001/.RUN-generate-")
    assert name.endswith("-0.tar")
    assert (done.code, done.talk) == (1, [
        "generate: 6 rows, 6 ok",
        f"left shard '00000001' as it is: {what}", *place(made, f"edits/00000001/{name}"), fix,
    ])  # fmt: skip
    assert list(made.root.glob("edits/00000001/*")) == list(made.root.glob("edits/00000001/.*")) == []
    assert ask(made, "stage", "generate").talk == ["generate: 3 rows, 3 ok"]
    assert count(made, "image_sha256 is not null") == 9


def test_a_tar_that_cannot_be_closed_is_deleted(tmp_path: Path) -> None:
    """What is left in the buffer is tried again when the file is closed, and fails again."""
    fault = Fault(str(tmp_path), ("write",), "edits/", times=0, errno=errno.ENOSPC)
    with armed(fault), pytest.raises(OSError) as raised, EditsTar(Layout(tmp_path), "a", "run-1", 0) as edits:
        edits.add("0.jpg", b"small enough for the buffer")
        edits.close()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, f"{tmp_path}/edits/a/run-1-0.tar")
    assert len(fault.passed) > 1
    assert list((tmp_path / "edits/a").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "file", "number", "said"),
    [
        ("parquet", "columns/00000001/source.g000001.parquet", errno.ENOSPC, FULL),
        ("fsync", "samples/00000001.parquet", errno.EIO, BROKEN),
    ],
)
def test_ingest_that_cannot_write_a_shard(
    own: Callable[..., Workspace], ask: Callable[..., Done], kind: str, file: str, number: int, said: list[str]
) -> None:
    made = own(ingested=False)
    folder, _, name = file.rpartition("/")
    with armed(Fault(str(made.root), (kind,), rf"{folder}/\.{name}", times=0, errno=number)):
        done = ask(made, "ingest")
    what, fix = said
    assert (done.code, done.talk) == (1, [
        "ingest: 2 shards, 8 rows", f"left shard '00000001' as it is: {what}", *place(made, file), fix,
    ])  # fmt: skip
    assert temps(made) == []
    assert ask(made, "ingest").code == 0
    assert count(made, "source_status = 'ok'") == 12


def test_a_full_disk_inside_a_hybrid_shard(own: Callable[..., Workspace], ask: Callable[..., Done]) -> None:
    made = own()
    assert ask(made, "write").code == 0
    before = {path.name: path.read_bytes() for path in made.root.glob("shards/*.tar")}
    (made.folder / "write.sql").write_text(WRITE.replace("a new caption", "a newer one"))
    with armed(Fault(str(made.root), ("write",), r"shards/\.00000001.tar", when="half", errno=errno.ENOSPC)):
        done = ask(made, "write")
    what, fix = FULL
    assert (done.code, done.talk) == (1, [
        "write: 2 shards, 8 rows, 2 edited",
        f"left shard '00000001' as it is: {what}", *place(made, "shards/00000001.tar"), fix,
    ])  # fmt: skip
    assert (made.root / "shards/00000001.tar").read_bytes() == before["00000001.tar"]
    assert temps(made) == []
    assert ask(made, "write").talk == ["write: 1 shards, 4 rows, 1 edited"]
    assert ask(made, "verify").code == 0


def test_planning_on_a_full_disk(own: Callable[..., Workspace], ask: Callable[..., Done]) -> None:
    """Before any task: the run's own files."""
    made = own()
    for command in (["stage", "note"], ["write"]):
        for path in ("runs/.*run.json", "runs/.*workset"):
            with armed(Fault(str(made.root), ("write", "parquet"), path, errno=errno.ENOSPC)):
                done = ask(made, *command)
            what, fix = FULL
            assert (done.code, done.talk) == (1, [f"error: {what}", *place(made, "runs"), fix])
    assert ask(made, "stage", "note").code == 0
    assert ask(made, "write").code == 0


def test_a_task_whose_result_cannot_be_written_is_told_by_its_process(own: Callable[..., Workspace]) -> None:
    """Nor its log: a real worker, whose words come through its pipe."""
    made = own()
    fault = Fault(str(made.root), ("create", "write"), "result.json", times=0, errno=errno.ENOSPC)
    done = made.process("stage", "note", check=False, cwd=made.folder, env={**os.environ, **environment(fault, made.folder / "site")})  # fmt: skip  # noqa: E501
    [run] = made.root.glob("runs/*")
    what, fix = FULL
    assert (done.returncode, talk(done.stderr)) == (1, [
        f"error: {what}", *place(made, f"runs/{run.name}/tasks/00000.result.json"),
        f"  log: {run}/logs/00000.log", fix,
    ])  # fmt: skip
    assert count(made, "note is not null") == 12


# --- bytes that cannot be read ---


def offset_of(made: Workspace, row: int) -> int:
    """Where the image of a row of the second shard lies."""
    [(offset,)] = made.rows(f"select source_members[1].data from samples where shard = '00000001' and row = {row}")
    return int(offset)


@contextlib.contextmanager
def unreadable(path: Path, places: set[int], number: int) -> Iterator[None]:
    """Reads of a file at these offsets fail, however often it is opened."""
    real = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if offset in places and files.name_of(descriptor) == str(path):
            raise OSError(number, os.strerror(number))
        return real(descriptor, size, offset)

    os.pread = pread
    try:
        yield
    finally:
        os.pread = real


#: What a disk or a file server may answer once, and give at the next opening.
HICCUPS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


@pytest.mark.parametrize("number", HICCUPS)
@pytest.mark.parametrize("nth", [0, 2, 3])
def test_a_read_that_fails_once_costs_nothing(
    own: Callable[..., Workspace], ask: Callable[..., Done], number: int, nth: int
) -> None:
    made = own("Sized")
    with armed(Fault(str(made.folder), ("read",), "source/00000001.tar", nth=nth, errno=number)) as fault:
        done = ask(made, "stage", "note")
    assert (done.code, done.talk) == (0, ["note: 12 rows, 12 ok"])
    assert len(fault.passed) == ROWS + 1  # at a second opening


@pytest.mark.parametrize("number", HICCUPS)
def test_a_file_that_its_server_has_lost_is_opened_again(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What was open stays lost, however often it is read."""
    made = own("Sized")
    path, opened, read = made.folder / "source/00000001.tar", os.open, os.pread
    descriptors: list[int] = []

    def opening(name: Any, *arguments: Any, **options: Any) -> int:
        descriptor = opened(name, *arguments, **options)
        if str(name) == str(path):
            descriptors.append(descriptor)
        return descriptor

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if descriptors == [descriptor] and files.name_of(descriptor) == str(path):
            raise OSError(number, os.strerror(number))
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pread", pread)
    assert ask(made, "stage", "note") == Done(0, "", ["note: 12 rows, 12 ok"])
    assert len(descriptors) == 2


@pytest.mark.parametrize("number", HICCUPS)
def test_a_row_whose_bytes_cannot_be_read_at_a_second_opening_fails_alone(
    own: Callable[..., Workspace], ask: Callable[..., Done], number: int
) -> None:
    """Others of its shard are read; so it is, too, where it has a batch of its own."""
    made = own("Sized")
    offset = offset_of(made, 2)
    for rows in (2, 1):
        with unreadable(made.folder / "source/00000001.tar", {offset}, number):
            done = ask(made, "stage", "note", "--set", f"stages.note.run.batch_rows={rows}")
        assert (done.code, done.talk[0]) == (3, "note: 12 rows, 11 ok, 1 failed")
        assert made.rows("select shard, row, note_error from samples where note_status = 'failed'") == [
            ("00000001", 2, f"ReadError: byte {offset} of the file cannot be read: {os.strerror(number)}")
        ]
        assert ask(made, "stage", "note", "--retry", "failed:ReadError").talk == ["note: 1 rows, 1 ok"]
        for path in made.root.glob("columns/*/note.*"):
            path.unlink()  # as if it had never run


@pytest.mark.parametrize("others", [(), (1,)])
def test_a_row_for_which_a_descriptor_is_wanting_fails_not_though_others_are_read(
    own: Callable[..., Workspace], ask: Callable[..., Done], others: tuple[int, ...]
) -> None:
    """Also behind one that the disk does not give."""
    made = own("Sized")
    path = made.folder / "source/00000001.tar"
    with (
        unreadable(path, {offset_of(made, row) for row in others}, errno.EIO),
        unreadable(path, {offset_of(made, 2)}, errno.EMFILE),
    ):
        done = ask(made, "stage", "note", "--set", "stages.note.run.batch_rows=4")
    assert (done.code, count(made, "note_status = 'failed'")) == (1, 0), done.talk
    assert "left shard '00000001' as it is: this process has too many files open" in done.talk
    assert ask(made, "stage", "note").talk == ["note: 4 rows, 4 ok"]


@pytest.mark.parametrize(("rows", "row"), [(2, 1), (1, 3), (4, 0)])
def test_a_row_for_whose_bytes_there_is_no_memory_fails_alone(
    own: Callable[..., Workspace], ask: Callable[..., Done], rows: int, row: int
) -> None:
    made = own("Sized")
    with unreadable(made.folder / "source/00000001.tar", {offset_of(made, row)}, errno.ENOMEM):
        done = ask(made, "stage", "note", "--set", f"stages.note.run.batch_rows={rows}")
    assert (done.code, done.talk[0]) == (3, "note: 12 rows, 11 ok, 1 failed")
    assert made.rows("select shard, row, note_error from samples where note_status = 'failed'") == [
        ("00000001", row, "OutOfMemory: there is too little memory")
    ]


@pytest.mark.parametrize("number", [*HICCUPS, errno.EMFILE, errno.ENOMEM])
def test_a_shard_of_which_nothing_is_read_is_left(
    own: Callable[..., Workspace], ask: Callable[..., Done], number: int
) -> None:
    """No row is failed; the others are done, and what is left by the same command."""
    made = own("Sized")
    path = made.folder / "source/00000001.tar"
    with unreadable(path, {offset_of(made, row) for row in range(ROWS)}, number):
        done = ask(made, "stage", "note")
    assert (done.code, done.talk[0]) == (1, "note: 8 rows, 8 ok")
    assert done.talk[1] == f"left shard '00000001' as it is: {machine.explained(OSError(number, '')).what}"
    assert f"  file: {path}" in done.talk
    assert count(made, "note_status = 'failed'") == 0
    assert ask(made, "stage", "note").talk == ["note: 4 rows, 4 ok"]


@pytest.mark.parametrize("number", HICCUPS)
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("has_empty", [True, False])
def test_a_row_of_which_nothing_is_read_does_not_tell_that_others_can_be(
    own: Callable[..., Workspace], ask: Callable[..., Done], number: int, rows: int, has_empty: bool
) -> None:
    """A member that a sample lacks, or that is empty."""
    made = own("SizedText", ingested=False)
    path = made.folder / "source/00000001.tar"
    members = [member for sample in samples(ROWS, start=ROWS) for member in sample.members()]
    members[2] = (members[2][0], b"")
    write_tar(path, members if has_empty else [*members[:2], *members[3:]])
    ingest_here(made.load())
    with armed(Fault(str(made.folder), ("read",), "source/00000001.tar", times=0, errno=number)):
        done = ask(made, "stage", "note", "--set", f"stages.note.run.batch_rows={rows}")
    assert (done.code, count(made, "note_status = 'failed'")) == (1, 0), done.talk
    assert done.talk[1] == f"left shard '00000001' as it is: {machine.explained(OSError(number, '')).what}"
    assert ask(made, "stage", "note").code == 0


@pytest.mark.parametrize("then", [errno.ENOENT, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_source_that_does_not_open_a_second_time_fails_no_row(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, rows: int, then: int
) -> None:
    """As where a file server has lost the open file, since its name stands for another one or none."""
    made = own("Sized")
    path, real = made.folder / "source/00000001.tar", os.open

    def opened(name: Any, *arguments: Any, **options: Any) -> int:
        if str(name) == str(path) and lost:
            raise OSError(then, os.strerror(then), str(name))
        return real(name, *arguments, **options)

    lost: list[bool] = []
    real_read = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if files.name_of(descriptor) == str(path) and offset in places:
            lost.append(True)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real_read(descriptor, size, offset)

    places = {offset_of(made, row) for row in range(1, ROWS)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "pread", pread)
        done = ask(made, "stage", "note", "--set", f"stages.note.run.batch_rows={rows}")
    assert count(made, "note_status = 'failed'") == 0, done.talk
    word = "left" if then == errno.ESTALE else "refused"
    assert any(line.startswith(f"{word} shard '00000001'") for line in done.talk), done.talk
    assert not any("Bad file descriptor" in line for line in done.talk), done.talk
    assert ask(made, "stage", "note").code == 0
    assert count(made, "note_status = 'ok'") == 3 * ROWS


def test_a_source_that_is_cut_while_it_is_read_fails_no_row(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is copied over: whole again, it is gone on with."""
    made = own("Sized")
    path = made.folder / "source/00000001.tar"
    whole, stat = path.read_bytes(), path.stat()
    real = files.read_at

    def cut(descriptor: int, offset: int, size: int) -> bytes:
        if files.name_of(descriptor) == str(path):
            os.truncate(path, offset)
        return real(descriptor, offset, size)

    monkeypatch.setattr(files, "read_at", cut)
    done = ask(made, "stage", "note")
    monkeypatch.setattr(files, "read_at", real)
    assert (done.code, done.talk[:2]) == (
        3, ["note: 8 rows, 8 ok", "refused shard '00000001': the source shard was cut while it was read"],
    )  # fmt: skip
    assert count(made, "note_status = 'failed'") == 0
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ask(made, "stage", "note").talk == ["note: 4 rows, 4 ok"]


@pytest.mark.parametrize("number", HICCUPS)
@pytest.mark.parametrize("times", [1, 0])
def test_a_source_that_cannot_be_read_is_not_written(
    own: Callable[..., Workspace], ask: Callable[..., Done], number: int, times: int
) -> None:
    made = own()
    with armed(Fault(str(made.folder), ("read",), "source/00000001.tar", times=times, errno=number)):
        done = ask(made, "write")
    if times:
        assert done == Done(0, "", ["write: 3 shards, 12 rows, 3 edited"])
        return
    assert (done.code, done.talk[0]) == (1, "write: 2 shards, 8 rows, 2 edited")
    assert done.talk[1] == f"left shard '00000001' as it is: {machine.explained(OSError(number, '')).what}"
    assert f"  file: {made.folder}/source/00000001.tar" in done.talk
    assert temps(made) == []
    assert ask(made, "write").talk == ["write: 1 shards, 4 rows, 1 edited"]


def vanish(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, path: Path) -> Path:
    """Takes a file away when a function was called for the first time; returns where it is."""
    aside = path.with_suffix(".aside")
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        monkeypatch.setattr(owner, name, real)
        path.rename(aside)
        return result

    monkeypatch.setattr(owner, name, call)
    return aside


@pytest.mark.parametrize(
    ("words", "owner", "name", "first", "said", "rest"),
    [
        (
            ("ingest",), worker, "ingest_shard", "ingest: 2 shards, 8 rows",
            ["the shard cannot be read: No such file or directory", "  file: {path}",
             "  fix: put it back or take it out of dataset.shards, then run the same command again"],
            "ingest: 1 shards, 4 rows",
        ),
        (
            ("stage", "note"), commits, "commit", "note: 8 rows, 8 ok",
            ["the source shard cannot be read: No such file or directory", "  file: {path}",
             "  fix: put it back, or ingest it as it is now: builder ingest",
             "(each builder command with --pipeline {pipeline})"],
            "note: 4 rows, 4 ok",
        ),
        (
            ("write",), splice, "write_shard", "write: 2 shards, 8 rows, 2 edited",
            ["the source shard cannot be read: No such file or directory", "  shard: 00000001", "  file: {path}",
             "  fix: put it back, or ingest it as it is now: builder ingest",
             "(each builder command with --pipeline {pipeline})"],
            "write: 1 shards, 4 rows, 1 edited",
        ),
    ],
)  # fmt: skip
def test_a_shard_that_vanishes_in_the_middle(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...],
    owner: Any, name: str, first: str, said: list[str], rest: str,
) -> None:  # fmt: skip
    made = own("Sized", ingested=words[0] != "ingest")
    path = made.folder / "source/00000001.tar"
    aside = vanish(monkeypatch, owner, name, path)
    done = ask(made, *words)
    lines = [line.format(path=path, pipeline=made.file) for line in said]
    assert (done.code, done.talk) == (3, [first, f"refused shard '00000001': {lines[0]}", *lines[1:]])
    aside.rename(path)
    assert ask(made, *words).talk == [rest]


@pytest.mark.parametrize("number", [*HICCUPS, errno.EMFILE])
@pytest.mark.parametrize("file", ["source/00000001.tar", "out/shards/00000001.tar", "out/samples/00000001.parquet"])
def test_verify_calls_what_it_cannot_read_no_difference(
    own: Callable[..., Workspace], ask: Callable[..., Done], number: int, file: str
) -> None:
    made = own()
    assert ask(made, "write").code == 0
    kinds = ("read", "parquet_read")
    if number in HICCUPS:
        with armed(Fault(str(made.folder), kinds, f"^{file}$", errno=number)):
            assert ask(made, "verify").code == 0
    with armed(Fault(str(made.folder), kinds, f"^{file}$", times=0, errno=number)):
        done = ask(made, "verify")
    what = machine.explained(OSError(number, "")).what
    assert done.code == 1
    assert f"not proven, not read: shard '00000001': {what}" in done.talk
    assert not any(line.startswith("wrong: ") for line in done.talk)
    assert re.search(r"shards proven +2 of 3", done.out)
    assert ask(made, "verify").code == 0


@pytest.mark.parametrize("number", HICCUPS)
def test_a_folder_that_is_not_listed_makes_no_shard_vanish(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    made = own()
    real = os.scandir
    left = [0]

    def scandir(folder: Any) -> Any:
        if str(folder).startswith(f"{made.folder}/source") and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    for times, code in ((1, 0), (99, 1)):
        left[0] = times
        done = ask(made, "stage", "note", "--redo")
        assert done.code == code, done.talk
    assert done.talk[0] == f"error: {machine.explained(OSError(number, '')).what}"


@pytest.mark.parametrize("step", ["group", "digests"])
def test_a_shard_that_changes_while_it_is_read_is_refused(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What was read of it is committed neither the first time nor behind what an ingest has read before."""
    made = own(ingested=step == "digests")
    path, real = made.folder / "source/00000001.tar", getattr(shards, step)
    times = itertools.count(1)
    os.utime(path, (1, next(times)))

    def meanwhile(*arguments: Any) -> Any:
        os.utime(path, (1, next(times)))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, step, meanwhile)
        done = ask(made, "ingest")
    assert done.code == 3
    assert "refused shard '00000001': the shard changed while it was read" in done.talk
    layout = made.load().layout
    assert column_files.newest(layout, "00000001") == ({"source": 1} if step == "digests" else {})
    assert ask(made, "ingest").code == 0


def test_a_page_that_is_not_there_is_told_and_kills_nothing(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is cut between its length and its pages: touched, such a page kills with SIGBUS."""
    made = own(ingested=False)
    path = made.folder / "source/00000001.tar"
    real = indexing._page_in

    def cut(view: Any, descriptor: int) -> None:
        if files.name_of(descriptor) == str(path):
            os.truncate(path, 4096)
        real(view, descriptor)

    monkeypatch.setattr(indexing, "_page_in", cut)
    done = ask(made, "ingest")
    assert (done.code, done.talk[0]) == (3, "ingest: 2 shards, 8 rows")
    assert done.talk[1].startswith("refused shard '00000001': the file ends at byte 4096, ")


# --- a root that cannot be written ---


@contextlib.contextmanager
def read_only(root: Path) -> Iterator[int]:
    """A root in which nothing can be made: by its rights, or for root, who is above rights, by the calls' answers."""
    if os.geteuid() == 0:
        with armed(Fault(str(root), ("create", "link", "rename", "unlink", "mkdir"), times=0, errno=errno.EROFS)):
            yield errno.EROFS
        return
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield errno.EACCES
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_read_only_root_can_be_asked_and_not_worked_on(
    own: Callable[..., Workspace], ask: Callable[..., Done]
) -> None:
    made = own()
    assert ask(made, "run").code == 0
    with read_only(made.root) as number:
        assert ask(made, "sql", "select count(*) from samples", "--json").out.strip() == '[{"count_star()": 12}]'
        for words in (("status",), ("plan",), ("verify",), ("show", "00000000:0")):
            assert ask(made, *words).code == 0, words
        done = ask(made, "stage", "note", "--redo")
        expected = machine.explained(OSError(number, "", done.talk[1].removeprefix("  file: ")))
        assert (done.code, done.talk) == (1, f"error: {expected}".splitlines())
        assert done.talk[1].startswith(f"  file: {made.root}/")
        assert done.talk[0] in ("error: the file system is read-only", "error: permission denied")
    assert ask(made, "stage", "note", "--redo").talk == ["note: 12 rows, 12 ok"]


# --- limits of a process ---


@contextlib.contextmanager
def descriptors(left: int) -> Iterator[None]:
    """So many more files may be opened by this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    held: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(left):
            os.close(held.pop())
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files(own: Callable[..., Workspace]) -> None:
    """A real limit: a task that can open nothing stops, and one that can goes on."""
    made = own()
    from support.planned import do as task
    from support.planned import plan

    layout, stage = made.load().layout, Note(Options())
    run = plan(layout, stage)
    real = stage.setup
    with contextlib.ExitStack() as stack:
        stage.setup = lambda device: stack.enter_context(descriptors(0))  # type: ignore[method-assign,func-returns-value]
        with pytest.raises(TransientError) as told:
            task(layout, run, stage)
    assert str(told.value).splitlines()[0] == "this process has too many files open"
    assert str(told.value).splitlines()[-2:] == [
        "  shards in a row: 3", f"  fix: raise its limit: ulimit -n 4096; {GO_ON}",
    ]  # fmt: skip
    stage.setup = real  # type: ignore[method-assign]
    assert task(layout, run, stage).ok == 12


def test_a_question_with_too_many_open_files(own: Callable[..., Workspace]) -> None:
    """A real limit, met by DuckDB: no fault of the SQL."""
    made = own()
    layout = made.load().layout
    with Samples(layout, root_schema.load_schema(layout)[1], layout.partitions()) as asked:
        with descriptors(0), pytest.raises(TransientError) as told:
            asked.rows(Sql("select caption from samples", "question.sql"))
        assert len(asked.rows(Sql("select caption from samples", "question.sql"))) == 12
    lines = str(told.value).splitlines()
    assert lines[0].startswith("DuckDB cannot go on: IO Error: ")
    assert lines[0].endswith("Too many open files")
    assert lines[1:] == [
        "  file: question.sql",
        "  fix: free some disk or memory, or raise ulimit -n, then run the same command again",
    ]


def test_workers_that_cannot_be_started_are_done_without(tmp_path: Path) -> None:
    """A real limit: descriptors for two or three workers, and four are asked for."""
    with descriptors(12):
        pool = TaskPool(
            lambda number: [sys.executable, "-c", "import time; time.sleep(0.3)"], 4,
            lambda number: tmp_path / f"logs/{number}.log", workers=4,
        )  # fmt: skip
        ended = run_to_end(pool, 4)
    assert ended == [Ended(number, 0, 0) for number in range(4)]


@contextlib.contextmanager
def file_size(limit: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes; Python ignores SIGXFSZ, so that the call fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_parquet_file_that_the_library_cannot_write(tmp_path: Path) -> None:
    """A real error out of the writer in C++: it has a number, and no file."""
    import pyarrow as pa

    content = pa.table({"a": [os.urandom(64).hex() for _ in range(200)]})
    with file_size(4096), pytest.raises(OSError) as raised:
        files.write_atomic(tmp_path / "a.parquet", lambda path: column_files.write_parquet(content, {}, path))
    assert str(machine.explained(raised.value)) == (
        "a file is larger than this process may write\n"
        f"  file: {tmp_path}/a.parquet\n"
        f"  fix: raise its limit: ulimit -f unlimited; {GO_ON}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files(own: Callable[..., Workspace], ask: Callable[..., Done]) -> None:
    """A real limit, under which the hybrid shards do not fit, and everything else does."""
    made = own()
    limit = (made.folder / "source/00000000.tar").stat().st_size // 2
    with file_size(limit):
        done = ask(made, "write")
    assert (done.code, done.talk) == (1, ["write: nothing"] + [
        line
        for number in range(3)
        for line in (
            f"left shard '{number:08d}' as it is: a file is larger than this process may write",
            f"  file: {made.root}/shards/{number:08d}.tar",
            f"  fix: raise its limit: ulimit -f unlimited; {GO_ON}",
        )
    ])  # fmt: skip
    assert temps(made) == []
    assert ask(made, "write").talk == ["write: 3 shards, 12 rows, 3 edited"]


# --- processes that die ---


def test_a_stage_that_faults_on_one_row(own: Callable[..., Workspace]) -> None:
    """A real SIGSEGV: the row fails alone, and the log says in which line of the stage."""
    made = own("Faulty", bad=f'["{key(5)}"]')
    done = made.process("stage", "note", check=False, cwd=made.folder)
    assert (done.returncode, talk(done.stderr)) == (3, [
        "note: 12 rows, 11 ok, 1 failed", "note: 1 failed",
        f"  why: builder status --pipeline {made.file}",
        f"  to try them again: builder stage note --retry failed --pipeline {made.file}",
    ])  # fmt: skip
    assert made.rows("select shard, row, note_error from samples where note_status = 'failed'") == [
        ("00000001", 1, "ProcessDied: the process died twice in this row")
    ]
    [log] = made.root.glob("runs/*/logs/00000.log")
    assert "Fatal Python error: Segmentation fault" in log.read_text()
    assert 'stages.py", line ' in log.read_text()


def test_a_row_alone_in_which_the_system_kills_the_process_is_left(own: Callable[..., Workspace]) -> None:
    """Nothing says that it is the row: others are answered, it stays null, and it is done once there is memory."""
    made = own("Dies", bad=f'["{key(5)}"]')
    sql = made.folder / "note.sql"
    sql.write_text(SQL + " where shard = '00000001' and row = 1")
    done = made.process("stage", "note", check=False, cwd=made.folder)
    [run] = made.root.glob("runs/*")
    assert (done.returncode, talk(done.stderr)) == (1, [
        "note: nothing",
        "left shard '00000001' as it is: the system killed the process twice in row 1, with no other row answered in "
        "between",
        f"  log: {run}/logs/00000.log",
        "  fix: see dmesg for lack of memory; end other programs or set fewer workers, then run the same command again",
    ])  # fmt: skip
    assert count(made, "note_status is not null") == 0
    sql.write_text(SQL)
    done = made.process("stage", "note", check=False, cwd=made.folder)
    assert (done.returncode, talk(done.stderr)[0]) == (3, "note: 12 rows, 11 ok, 1 failed")
    assert made.rows("select shard, row, note_error from samples where note_status = 'failed'") == [
        ("00000001", 1, "ProcessDied: the process died twice in this row")
    ]


def test_a_stage_whose_process_dies_before_its_first_row(own: Callable[..., Workspace]) -> None:
    made = own("DiesAtOnce")
    done = made.process("stage", "note", check=False, cwd=made.folder)
    [run] = made.root.glob("runs/*")
    assert (done.returncode, talk(done.stderr)) == (1, [
        "error: task 0 was given up: its process ended with SIGKILL 3 times",
        f"  log: {run}/logs/00000.log", "  last lines: none",
        "  fix: what was committed is kept: see dmesg for lack of memory; end other programs or set fewer workers and "
        "run the same command again",
    ])  # fmt: skip


def test_a_run_goes_on_behind_a_stage_whose_process_the_system_kills(own: Callable[..., Workspace]) -> None:
    made = own("DiesAtOnce")
    (made.folder / "generate.sql").write_text(PROMPTS.replace("row > 0", "row = 0"))
    done = made.process("run", check=False, cwd=made.folder)
    assert done.returncode == 1
    lines = talk(done.stderr)
    assert "note: not finished: task 0 was given up: its process ended with SIGKILL 3 times" in lines
    assert count(made, "image_path is not null") == 3
    assert "write: 3 shards, 12 rows, 3 edited" in lines


@pytest.mark.parametrize("number", HICCUPS)
def test_a_changed_source_whose_pictures_cannot_be_read_is_left(
    own: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The others are ingested, and it is once it can be read."""
    made = own()
    for shard in range(3):
        path = made.folder / f"source/{shard:08d}.tar"
        os.utime(path, (1, 1))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with armed(Fault(str(made.folder), ("read",), "source/00000001.tar", times=0, errno=number)):
        done = ask(made, "ingest")
    assert (done.code, done.talk[0]) == (1, "ingest: 2 shards, 8 rows"), done.talk
    assert done.talk[1].startswith("left shard '00000001' as it is: "), done.talk
    done = ask(made, "ingest")
    assert (done.code, done.talk[0]) == (0, "ingest: 1 shards, 4 rows")


def test_a_shard_in_which_the_process_dies_is_left(own: Callable[..., Workspace]) -> None:
    """Killed whenever it comes to one shard: the others are ingested, and all once it is not."""
    made = own(ingested=False)
    fault = Fault(str(made.root), ("mkdir",), "columns/00000001$", times=0)
    done = made.process("ingest", check=False, cwd=made.folder, env={**os.environ, **environment(fault, made.folder / "site")})  # fmt: skip  # noqa: E501
    [run] = made.root.glob("runs/*")
    assert (done.returncode, talk(done.stderr)) == (1, [
        "ingest: 2 shards, 8 rows",
        "left shard '00000001' as it is: the system killed the process twice in this shard",
        f"  log: {run}/logs/00000.log",
        "  fix: see dmesg for lack of memory; end other programs or set fewer workers; run the same command again",
    ])  # fmt: skip
    assert talk(made.process("ingest", cwd=made.folder).stderr) == ["ingest: 1 shards, 4 rows"]
    assert count(made, "source_status = 'ok'") == 12
