"""What is the machine's: known by what an error says, wherever it was raised; no row fails by it."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL.JpegImagePlugin import JpegImageFile

from builder import machine
from builder.engine import batches as answering
from builder.engine import worker
from builder.errors import ShardError, StageError, TransientError
from builder.machine import Sort, sort_of
from builder.models import pictures
from builder.sources.tars import shards
from builder.stages.finding import find
from builder.store.files import ReadError
from conftest import Done, Workspace, ingest_here, make_shard, picture, samples
from support.faults import Fault, armed
from support.planned import SQL, section
from support.stages import SAID, Note, Options

Make = Callable[..., Workspace]
ROWS = 4


def count(made: Workspace, condition: str) -> int:
    return int(made.rows(f"select count(*) from samples where {condition}")[0][0])


def first(done: Done) -> str:
    """What a command said of its rows: tracebacks, which go to the log of a task, stand before it here."""
    return next(line for line in done.talk if line.startswith("note: "))


def caused(by: BaseException, error: Exception) -> Exception:
    error.__cause__ = by
    return error


def of(kind: str, module: str, text: str) -> Exception:
    """An error of a library that need not be here."""
    error: Exception = type(kind, (Exception,), {"__module__": module})(text)
    return error


@pytest.mark.parametrize(
    ("error", "sort"),
    [
        (OSError(errno.ENOSPC, "full"), Sort.SHORTAGE),
        (OSError(errno.EAGAIN, "no more processes"), Sort.SHORTAGE),
        (RuntimeError("can't start new thread"), Sort.SHORTAGE),
        (RuntimeError("Resource temporarily unavailable"), Sort.SHORTAGE),
        (of("IOException", "_duckdb", "IO Error: Cannot open file 'a': Too many open files"), Sort.SHORTAGE),
        (OSError(errno.ESTALE, "stale"), Sort.ACCESS),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), Sort.ACCESS),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), Sort.ACCESS),
        (ReadError(errno.EIO, "byte 3 of the file cannot be read: Input/output error"), Sort.ACCESS),
        (OSError("Unable to read (file read failed: errno = 5, error message = 'Input/output error')"), Sort.ACCESS),
        (of("IOException", "_duckdb", "IO Error: Could not read from file 'a'"), Sort.ACCESS),
        (MemoryError(), Sort.MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Sort.MEMORY),
        (OSError("out of memory error when reading image file"), Sort.MEMORY),
        (duckdb.OutOfMemoryException("could not allocate block of size 256 KiB"), Sort.MEMORY),
        (of("RuntimeException", "onnxruntime.capi", "Failed to allocate memory for requested buffer"), Sort.MEMORY),
        (of("error", "cv2", "OpenCV: alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate"), Sort.MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), Sort.MEMORY),
        (caused(OSError(errno.EIO, "lost"), ValueError("the picture does not decode")), Sort.ACCESS),
        (caused(OSError(errno.EIO, "lost"), ShardError("the source shard cannot be read")), Sort.ACCESS),
        # not the machine's: the row's, the SQL's, the stage's
        (ValueError("out of memory"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError("image file is truncated (12 bytes not processed)"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (PermissionError(errno.EACCES, "Permission denied"), None),
        (TimeoutError("the row took too long"), None),
        (pa.ArrowInvalid("Could not convert 'a' to int64"), None),
        (duckdb.IOException("IO Error: No files found that match the pattern 'a'"), None),
        (caused(OSError("broken data stream"), ValueError("the picture does not decode")), None),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_an_error_is_sorted_by_what_it_says(error: Exception, sort: Sort | None) -> None:
    assert sort_of(error) is sort


def test_what_an_error_was_handled_in_counts_unless_it_is_hidden() -> None:
    def raised(hidden: bool) -> Exception:
        try:
            try:
                raise OSError(errno.EMFILE, "Too many open files")
            except OSError:
                if hidden:
                    raise ValueError("no file") from None
                raise ValueError("no file")  # noqa: B904
        except ValueError as error:
            return error

    assert [sort_of(raised(hidden)) for hidden in (False, True)] == [Sort.SHORTAGE, None]


def test_words_of_an_error_that_may_pass_are_kept_if_nothing_of_the_machine_caused_it() -> None:
    own = TransientError("too little free disk", where={"folder": "out"}, fix="free some")
    assert machine.explained(own) is own
    own.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert machine.explained(own).what == "the disk is full"


@pytest.mark.parametrize("name", list(SAID))
def test_every_error_of_the_machine_has_words_and_a_fix(name: str) -> None:
    told = machine.explained(SAID[name]())
    assert isinstance(told, TransientError)
    assert told.fix.endswith("; then run the same command again: what is committed is kept")
    assert not told.fix.startswith("look for the cause")


# --- out of a stage ---


@pytest.fixture
def strained(workspace: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workspace]:
    """Two ingested shards of four samples, and a stage that the machine keeps from answering."""
    monkeypatch.setattr(answering, "TRANSIENT_PAUSE_S", 0.001)
    monkeypatch.setattr(machine, "PAUSE_S", 0.001)

    def make(kind: str = "Strained", *, shards: int = 2, batch_rows: int = 2) -> Workspace:
        made = workspace(
            {f"{i:08d}": samples(ROWS, start=i * ROWS) for i in range(shards)},
            stages=section(kind) + f"\n[stages.note.run]\nbatch_rows = {batch_rows}\n",
        )
        (made.folder / "note.sql").write_text(SQL)
        ingest_here(made.load())
        return made

    return make


def strain(made: Workspace, name: str, *rows: int) -> Path:
    path = made.folder / "strain"
    path.write_text(" ".join([name, *(f"{row:032x}-0" for row in rows)]))
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("Strained", name) for name in SAID), *(("StrainedAhead", name) for name in ("memory", "ENOSPC", "EIO"))],
)
def test_what_the_machine_says_out_of_a_stage_fails_no_row(
    strained: Callable[..., Workspace],
    ask: Callable[..., Done],
    name: str,
    kind: str,
) -> None:
    made = strained(kind)
    path = strain(made, name)
    done = ask(made, "stage", "note")
    assert done.code == 1
    what = machine.explained(SAID[name]()).what
    assert [line for line in done.talk if what in line] == [
        f"left shard '{i:08d}' as it is: {what}" for i in range(2)
    ], done.talk
    assert count(made, "note_status is not null") == 0
    path.unlink()
    assert ask(made, "stage", "note").talk == ["note: 8 rows, 8 ok"]


@pytest.mark.parametrize(
    ("name", "bad", "batch_rows"),
    [
        *((name, *place) for name in ("memory", "EIO") for place in ((1, 2), (1, 1), (3, 2), (7, 4), (7, 1))),
        *((name, 1, 2) for name in ("arrow", "cuda", "ENOMEM", "ETIMEDOUT")),
    ],
)
def test_a_row_that_fails_alone_while_others_are_answered_has_failed(
    strained: Callable[..., Workspace],
    ask: Callable[..., Done],
    name: str,
    bad: int,
    batch_rows: int,
) -> None:
    """The last of a shard and of a task, too, and one in a batch of its own."""
    made = strained(batch_rows=batch_rows)
    strain(made, name, bad)
    done = ask(made, "stage", "note")
    assert (done.code, first(done)) == (3, "note: 8 rows, 7 ok, 1 failed"), done.talk
    kind = "NotAnswered" if name in ("EIO", "ETIMEDOUT") else "OutOfMemory"
    [(error,)] = made.rows("select note_error from samples where note_status = 'failed'")
    assert error.startswith(f"{kind}: ")
    (made.folder / "strain").unlink()
    assert ask(made, "stage", "note", "--retry", f"failed:{kind}").talk == ["note: 1 rows, 1 ok"]


@pytest.mark.parametrize("bad", [(1, 2), (0, 1), (0, 1, 2), (5, 6, 7)])
@pytest.mark.parametrize("name", ["memory", "EIO"])
def test_rows_that_fail_alone_one_behind_the_other_do_not_starve_the_rest(
    strained: Callable[..., Workspace], ask: Callable[..., Done], name: str, bad: tuple[int, ...]
) -> None:
    made = strained(batch_rows=1)
    strain(made, name, *bad)
    done = ask(made, "stage", "note")
    assert (done.code, first(done)) == (3, f"note: 8 rows, {8 - len(bad)} ok, {len(bad)} failed"), done.talk


def test_a_shard_is_left_behind_sixteen_rows_that_are_not_answered(
    strained: Callable[..., Workspace], ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that answers nothing is not asked about all of them."""
    made = strained(batch_rows=1)
    make_shard(made.folder / "source/00000002.tar", samples(40, start=2 * ROWS))
    ingest_here(made.load())
    strain(made, "memory")
    assert ask(made, "stage", "note").code == 1
    asked = set((made.folder / "asked").read_text().split())
    assert sorted(asked) == [f"{i:032x}" for i in range(2 * ROWS + 16)]


def test_a_shard_of_which_no_row_is_answered_is_left_though_others_are(
    strained: Callable[..., Workspace], ask: Callable[..., Done]
) -> None:
    """What a server does not give of a whole shard says nothing of its rows; that it wants too much memory, does."""
    made = strained(batch_rows=2)
    path = strain(made, "EIO", 4, 5, 6, 7)
    done = ask(made, "stage", "note")
    assert (done.code, count(made, "note_status = 'failed'")) == (1, 0)
    assert done.talk[:2] == [
        "note: 4 rows, 4 ok", "left shard '00000001' as it is: the disk has an input/output error",
    ]  # fmt: skip
    path.write_text(path.read_text().replace("EIO", "memory"))
    assert first(ask(made, "stage", "note", "--redo")) == "note: 8 rows, 4 ok, 4 failed"


class _Full(Note):
    """Too little memory for two rows, and a full disk at the second."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if batch.num_rows > 1:
            raise MemoryError
        if batch.column("key").to_pylist() == ["b"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().process(batch)


def test_a_full_disk_fails_no_row_that_was_short_of_memory_before() -> None:
    """Though others were answered in between."""
    batch = pa.RecordBatch.from_pydict({name: ["a", "b"] for name in ("uid", "key", "text")})
    [(_, found), (row, left)] = answering.answer(_Full(Options()), batch)
    assert isinstance(found, pa.RecordBatch)
    assert isinstance(left, answering.Left)
    assert (row, left.is_final, left.why.what if left.why else "") == (1, True, "the disk is full")


def test_a_row_alone_in_its_work_is_left(
    strained: Callable[..., Workspace],
    ask: Callable[..., Done],
) -> None:
    """Nothing says that it is the row, and not the machine."""
    made = strained()
    path = strain(made, "memory", 5)
    sql = made.folder / "note.sql"
    sql.write_text(f"{SQL} where shard = '00000001' and row = 1")
    done = ask(made, "stage", "note")
    assert (done.code, count(made, "note_status is not null")) == (1, 0)
    sql.write_text(SQL)
    assert first(ask(made, "stage", "note")) == "note: 8 rows, 7 ok, 1 failed"
    path.unlink()


def test_memory_that_is_short_halves_the_batch(
    strained: Callable[..., Workspace],
    ask: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = strained(batch_rows=4)
    strain(made, "memory", 2)
    ask(made, "stage", "note")
    sizes = [len(line.split()) for line in (made.folder / "asked").read_text().splitlines()]
    assert sizes[:5] == [4, 2, 2, 1, 1]


def test_what_is_answered_in_a_shard_that_is_left_is_kept(
    strained: Callable[..., Workspace],
    ask: Callable[..., Done],
) -> None:
    made = strained()
    path = strain(made, "EMFILE", 3)
    done = ask(made, "stage", "note")
    assert (done.code, done.talk[0]) == (1, "note: 6 rows, 6 ok")
    assert made.rows("select row from samples where note is not null and shard = '00000000' order by row") == [
        (0,), (1,),
    ]  # fmt: skip
    path.unlink()
    assert ask(made, "stage", "note").talk == ["note: 2 rows, 2 ok"]
    assert len((made.folder / "asked").read_text().split()) == 2 + 2 + 4 + 2


def test_three_shards_in_a_row_without_memory_stop_a_task(
    strained: Callable[..., Workspace],
    ask: Callable[..., Done],
) -> None:
    made = strained(shards=5)
    strain(made, "memory")
    done = ask(made, "stage", "note")
    assert done.code == 1
    assert "error: there is too little memory" in done.talk
    assert "  shards in a row: 3" in done.talk
    assert count(made, "note_status is not null") == 0


@pytest.mark.parametrize("shards", [2, 4])
def test_a_run_goes_on_behind_a_stage_that_the_machine_kept_from_being_finished(
    workspace: Make, ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Where shards were left, and where so many in a row that its task stopped."""
    monkeypatch.setattr(answering, "TRANSIENT_PAUSE_S", 0.001)
    made = workspace(
        {f"{i:08d}": samples(ROWS, start=i * ROWS) for i in range(shards)},
        stages=section("Strained") + section("Other", name="other") + '\n[write]\nselect = "write.sql"\n',
    )
    (made.folder / "note.sql").write_text(SQL)
    (made.folder / "write.sql").write_text("select shard, row, uid, remark as caption from samples where row = 1")
    path = strain(made, "ENOSPC")
    done = ask(made, "run")
    assert done.code == 1
    assert any(line.startswith("note: not finished: ") for line in done.talk) == (shards > 2)
    assert (count(made, "note is not null"), count(made, "remark is not null")) == (0, shards * ROWS)
    assert f"write: {shards} shards, {shards * ROWS} rows, {shards} edited" in done.talk
    path.unlink()
    assert ask(made, "run").code == 0
    assert count(made, "note is not null") == shards * ROWS


def test_threads_that_cannot_be_started_fail_no_row(
    strained: Callable[..., Workspace],
    ask: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's own: Python's real error, met where a shard is opened."""
    made = strained()
    real = threading.Thread.start
    refused = []

    def start(self: threading.Thread) -> None:
        if self.name.startswith("committer") and not refused:
            refused.append(self.name)
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    done = ask(made, "stage", "note")
    assert refused
    assert (done.code, count(made, "note_status = 'failed'")) == (1, 0)
    assert ask(made, "stage", "note").code == 0
    assert count(made, "note is not null") == 8


# --- in builder's own places ---


def test_a_picture_for_which_memory_is_wanting_is_no_bad_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's word for it is an OSError like those on damage."""
    data = picture()
    for said, kind in (("out of memory error when reading image file", OSError), ("broken data stream", ValueError)):

        def load(self: Any, said: str = said) -> None:
            raise OSError(said)

        with monkeypatch.context() as patch:
            patch.setattr(pictures, "_HAS_SIMPLEJPEG", False)
            patch.setattr(JpegImageFile, "load", load)
            with pytest.raises(kind) as raised:
                pictures.decode(data)
        assert machine.is_out_of_memory(raised.value) == (kind is OSError)


def test_a_json_value_for_which_memory_is_wanting_is_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's word for it is an ArrowException like those on values that do not fit."""
    real = pa.array

    def array(values: Any, *arguments: Any, **options: Any) -> Any:
        if arguments == (pa.int32(),):
            raise pa.ArrowMemoryError("malloc of size 64 failed")
        return real(values, *arguments, **options)

    with tempfile.TemporaryDirectory() as folder:
        path = make_shard(Path(folder) / "a.tar", samples(2))
        monkeypatch.setattr(pa, "array", array)
        with pytest.raises(pa.ArrowMemoryError):
            shards.read_shard(path, "a", shards.TarShards({"original_width": pa.int32()}), "run")


@pytest.mark.parametrize("name", ["00000000_stats.json", "00000000.parquet"])
def test_a_count_beside_a_shard_that_the_machine_does_not_give_is_no_note(
    workspace: Make, ask: Callable[..., Done], name: str
) -> None:
    made = workspace({"00000000": samples(2)}, stages="")
    (made.folder / "source/00000000_stats.json").write_text('{"successes": 2}')
    if name.endswith(".parquet"):
        (made.folder / "source/00000000_stats.json").unlink()
        pq.write_table(pa.table({"status": ["success"] * 2}), made.folder / "source/00000000.parquet")
    kinds = ("open", "parquet_read")
    with armed(Fault(str(made.folder), kinds, f"^source/{name}$", times=0, errno=errno.EIO)):
        done = ask(made, "ingest")
    assert (done.code, done.talk[0]) == (1, "ingest: nothing")
    assert ask(made, "ingest").code == 0
    assert count(made, "source_notes is not null") == 0


# --- a stage of one's own that raises ---


def with_stage_of_ones_own(workspace: Make, rows: int) -> Workspace:
    """A dataset whose stage `mine` is to be written to my_stage.py."""
    made = workspace({"00000000": samples(rows)}, stages="""
[stages.mine]
python = "my_stage.py:Mine"
sql = "mine.sql"
""")  # fmt: skip
    (made.folder / "mine.sql").write_text("select shard, row, uid, caption as text from samples")
    return made


def test_a_failed_row_names_the_line_of_the_stage_and_the_log_has_the_traceback(
    workspace: Make,
    ask: Callable[..., Done],
) -> None:
    made = with_stage_of_ones_own(workspace, 3)
    (made.folder / "my_stage.py").write_text("""
import pyarrow as pa
from builder import Resources, Strict, output


class Mine:
    name, version, Options = "mine", "1", Strict
    inputs, members = pa.schema([("text", pa.string())]), ()
    outputs = pa.schema([output("letters", pa.int64(), "letters of the caption")])
    resources = Resources()

    def __init__(self, options):
        self.options = options

    def setup(self, device):
        pass

    def process(self, batch):
        return pa.RecordBatch.from_pydict({"letters": [self.count(t) for t in batch["text"].to_pylist()]}, self.outputs)

    def count(self, text):
        if text.endswith("1"):
            return len(None)
        return len(text)

    def close(self):
        pass
""")
    os.chdir(made.folder)
    done = ask(made, "ingest")
    done = ask(made, "stage", "mine")
    assert done.code == 3, done.talk
    assert made.rows("select mine_error from samples where mine_status = 'failed'") == [
        ("TypeError: object of type 'NoneType' has no len() (my_stage.py:23)",)
    ]
    assert 'my_stage.py", line 23, in count' in "\n".join(done.talk)  # the task's log is this process's own here
    assert sum("in count" in line for line in done.talk) == 1


@pytest.mark.parametrize(
    ("method", "command", "raises"),
    [
        ("__init__", ("run",), "KeyError: 'boom'"),
        ("check_setup", ("run",), "KeyError: 'boom'"),
        ("setup", ("run",), "KeyError: 'boom'"),
        ("setup", ("stage", "mine", "--try", "1"), "KeyError: 'boom'"),
        ("process", ("run",), "SystemExit: 3"),
        ("process", ("stage", "mine", "--try", "1"), "SystemExit: 3"),
        ("totals", ("run",), "KeyError: 'boom'"),
        ("close", ("run",), "KeyError: 'boom'"),
    ],
)
def test_whatever_a_stage_of_ones_own_raises_names_its_line(
    workspace: Make, ask: Callable[..., Done], method: str, command: tuple[str, ...], raises: str
) -> None:
    made = with_stage_of_ones_own(workspace, 2)
    raised = "sys.exit(3)" if raises == "SystemExit: 3" else "{}['boom']"
    (made.folder / "my_stage.py").write_text(f"""
import sys
import pyarrow as pa
from builder import Resources, Strict, output


def say(name):
    if name == "{method}":
        {raised}


class Mine:
    name, version, Options = "mine", "1", Strict
    inputs, members = pa.schema([("text", pa.string())]), ()
    outputs = pa.schema([output("letters", pa.int64(), "letters of the caption")])
    resources = Resources()

    def __init__(self, options):
        say("__init__")

    def check_setup(self):
        say("check_setup")

    def setup(self, device):
        say("setup")

    def process(self, batch):
        say("process")
        return pa.RecordBatch.from_pydict({{"letters": [1] * batch.num_rows}}, self.outputs)

    def totals(self):
        say("totals")
        return {{}}

    def close(self):
        say("close")
""")
    os.chdir(made.folder)
    if method != "__init__":
        assert ask(made, "ingest").code == 0
    done = ask(made, *command)
    assert done.code == (2 if method == "__init__" else 1), done.talk
    assert [line for line in done.talk if "my_stage.py:" in line and "error: " in line] == [
        f"error: stage 'mine': my_stage.py:9 raises {raises}"
    ]
    is_in_a_task = command == ("run",) and method not in ("__init__", "check_setup")
    assert any("Traceback" in line for line in done.talk) == is_in_a_task  # its log is this process's own here


def test_a_task_that_ends_well_and_says_nothing_of_what_it_did_is_not_done(
    workspace: Make, ask: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workspace({"00000000": samples(2)}, stages="")
    monkeypatch.setattr(worker, "run_task", lambda folder, number: 0)
    done = ask(made, "ingest")
    assert done.code == 1, done.talk
    assert "task 0 was given up: its process ended with exit code 0" in "\n".join(done.talk)


def test_a_stage_file_that_ends_the_process_is_told(tmp_path: Path) -> None:
    (tmp_path / "my_stage.py").write_text("import sys\n\nsys.exit(0)\n")
    with pytest.raises(StageError, match=r"my_stage.py', line 3 raises SystemExit: 0"):
        find("mine", f"{tmp_path}/my_stage.py:Mine")


def test_a_long_message_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    text = answering.error_text(ValueError("x" * 2000), "my_stage.py:41")
    assert len(text) == answering.MAX_ERROR
    assert text.startswith("ValueError: xxx")
    assert text.endswith("x (my_stage.py:41)")
