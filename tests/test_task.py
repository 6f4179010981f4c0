"""One task: bad rows are found, broken stages are stopped, checkpoints commit, nothing that is done is done again."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from builder import Bytes, Preparing, Resources, Stage, Strict, Value, machine
from builder.engine import batches as answering
from builder.engine.batches import error_text
from builder.engine.in_hand import InHand, Verdict
from builder.engine.shard import ShardWork
from builder.engine.task_state import Result
from builder.engine.work import Choice
from builder.errors import ShardError, StageError, TransientError
from builder.stages.comparison import difference
from builder.stages.contract import RowsFailed
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import column_files, commits, partitions, sweeps
from builder.table.commits import Swept
from builder.tar import head_check
from conftest import Workspace, ingest_here, make_shard, samples
from support.planned import SQL, do, plan, section
from support.stages import Base, Fails, Note, Options, Short, cannot

Make = Callable[..., Workspace]


def key(number: int) -> str:
    """The key of sample `number` of `conftest.samples`."""
    return f"{number:032x}-0"


def uid(number: int) -> str:
    return f"{number:032x}"


def read(layout: Layout, *names: str) -> list[tuple[Any, ...]]:
    """Columns of all partitions after a heal, rows in order."""
    partitions.heal(layout, layout.shard_names())
    found = []
    for shard in layout.shard_names():
        partition, _ = partitions.read_partition(layout, shard, names)
        found += list(zip(*(partition[name].to_pylist() for name in names), strict=True))
    return found


def notes(layout: Layout) -> list[str | None]:
    return [note for (note,) in read(layout, "note")]


def caption(number: int) -> str:
    return f"a man with a hat is standing in the street number {number}"


@pytest.fixture
def layout(dataset: Workspace) -> Layout:
    """Two ingested shards of eight samples."""
    return dataset.load().layout


class Counting(Base):
    """Keeps the uids of every batch that it sees."""

    def __init__(self, options: Options = Options()) -> None:  # noqa: B008
        super().__init__(options)
        self.seen: list[list[str]] = []

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self.seen.append([int(uid, 16) for uid in batch.column("uid").to_pylist()])
        return super().process(batch)


# --- bad rows ---


def test_halving_finds_exactly_the_bad_rows(layout: Layout) -> None:
    stage = Fails(Options(bad=[key(2), key(7), key(12)]))
    result = do(layout, plan(layout, stage), stage)
    assert (result.rows, result.ok, result.failed, result.kept, result.dropped) == (16, 13, 3, 0, 0)
    found = read(layout, "note_status", "note_error", "note")
    for number, row in enumerate(found):
        if number in (2, 7, 12):
            assert row == ("failed", cannot(key(number)), None)
        else:
            assert row == ("ok", None, f"seen: {caption(number)}")


def test_a_batch_is_halved_and_not_done_row_by_row(layout: Layout) -> None:
    class CountingFails(Counting):
        def check(self, batch: pa.RecordBatch) -> None:
            if key(5) in batch.column("key").to_pylist():
                raise ValueError("no")

    stage = CountingFails()
    do(layout, plan(layout, stage), stage, batch_rows=8)
    assert stage.seen == [
        [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [4], [5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15],
    ]  # fmt: skip


def test_an_error_is_one_line_of_printable_text() -> None:
    assert error_text(ValueError("a\n\tb  \x1b[31mc")) == "ValueError: a b [31mc"
    assert error_text(StageError("what", where={"shard": "a"}, fix="do")) == "StageError: what"
    assert error_text(KeyError("x" * 1000)) == ("KeyError: '" + "x" * 1000)[: answering.MAX_ERROR]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("rate_limited", "rate_limited: no"),
        ("two\nlines", "Strange: no"),
        ("x" * 1000, "Strange: no"),
        ("", "Strange: no"),
        (7, "Strange: no"),
    ],
)
def test_the_class_of_an_error_is_a_word(kind: Any, text: str) -> None:
    """An error of somebody's library may call anything its kind; `--retry failed:CLASS` must find it again."""

    class Strange(Exception):
        pass

    error = Strange("no")
    error.kind = kind  # type: ignore[attr-defined]
    assert error_text(error) == text


def test_a_failing_redo_keeps_the_answers_and_tells_the_log(layout: Layout) -> None:
    do(layout, plan(layout, Note(Options())), Note(Options()))
    stage = Fails(Options(word="again", bad=[key(3), key(9)]))
    run = plan(layout, stage, Choice(redo=True))
    result = do(layout, run, stage)
    assert (result.rows, result.ok, result.failed, result.kept) == (16, 14, 0, 2)
    assert notes(layout) == [f"{'seen' if i in (3, 9) else 'again'}: {caption(i)}" for i in range(16)]
    assert {status for (status,) in read(layout, "note_status")} == {"ok"}
    assert [json.loads(line) for line in run.failures(0).read_text().splitlines()] == [
        {"shard": "00000000", "row": 3, "error": cannot(key(3))},
        {"shard": "00000001", "row": 1, "error": cannot(key(9))},
    ]


# --- broken stages ---


class Wide(Base):
    """Breaks its contract: another column."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_pydict({"note": ["x"] * batch.num_rows, "more": [1] * batch.num_rows})


class Silent(Base):
    """Breaks its contract: forgets to return."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Short,
            "stage 'note' returned 3 rows for a batch of 4\n"
            "  fix: return one row for each row of the batch, in the same order",
        ),
        (
            Wide,
            "stage 'note' returned other columns than it declares\n"
            "  declared: note string\n"
            "  returned: note string, more int64\n"
            "  fix: return pa.RecordBatch.from_pydict({...}, schema=self.schema)",
        ),
        (
            Silent,
            "stage 'note' returned NoneType, not a RecordBatch: did you forget the return statement?\n"
            "  fix: return pa.RecordBatch.from_pydict({...}, schema=self.schema)",
        ),
    ],
)
def test_a_broken_contract_stops_and_marks_no_row(layout: Layout, kind: type[Base], message: str) -> None:
    stage = kind(Options())
    run = plan(layout, stage)
    with pytest.raises(StageError) as broken:
        do(layout, run, stage)
    assert str(broken.value) == message
    assert read(layout, "note_status", "note_run") == [(None, None)] * 16


def test_a_stage_that_cannot_start_marks_no_row(workspace: Make) -> None:
    made = workspace(stages=section("NoModel"))
    (made.folder / "note.sql").write_text(SQL)
    ingest_here(made.load())
    done = made.run("stage", "note", check=False, cwd=made.folder)
    assert done.returncode == 1
    [run] = (made.root / "runs").iterdir()
    assert done.stderr.splitlines()[1:] == [
        "error: there is no model in '/models/none'",
        f"  log: {run}/logs/00000.log",
        "  fix: name a folder that has one",
    ]
    assert made.rows("select distinct note_status, note_run from samples") == [(None, None)]
    assert "there is no model in '/models/none'" in (run / "logs/00000.log").read_text()


@pytest.fixture
def many(workspace: Make) -> Layout:
    """Two ingested shards of 80 samples."""
    made = workspace({"00000000": samples(80), "00000001": samples(80, start=80)})
    ingest_here(made.load())
    return made.load().layout


def test_past_max_failed_a_task_stops_and_leaves_its_failures_null(many: Layout) -> None:
    bad = [key(number) for number in range(160) if number % 10 < 7]
    stage = Fails(Options(bad=bad))
    run = plan(many, stage)
    with pytest.raises(StageError) as stopped:
        do(many, run, stage, max_failed=0.5, checkpoint_rows=80, batch_rows=10)
    assert str(stopped.value) == (
        "stage 'note' failed on 70 of 100 rows, more than max_failed = 0.5\n"
        "  shard: 00000001\n"
        f"  last error: {cannot(key(96))}\n"
        "  fix: fix the cause of the last error and run again "
        "(no row of the last checkpoint was marked failed), or raise max_failed in "
        "[stages.note.run]"
    )
    statuses = [status for (status,) in read(many, "note_status")]
    assert statuses[:80] == (["failed"] * 7 + ["ok"] * 3) * 8  # a checkpoint before there was enough to judge
    assert statuses[80:100] == ([None] * 7 + ["ok"] * 3) * 2  # answers stay, failures are left null
    assert statuses[100:] == [None] * 60


@pytest.mark.parametrize(("limit", "rows"), [(0.7, 160), (0.5, 99)])
def test_at_max_failed_or_before_100_rows_a_task_goes_on(many: Layout, limit: float, rows: int) -> None:
    bad = [key(number) for number in range(160) if number % 10 < 7]
    stage = Fails(Options(bad=bad))
    run = plan(many, stage, sql=f"{SQL} order by shard, row limit {rows}")
    result = do(many, run, stage, max_failed=limit, batch_rows=10)
    assert (result.rows, result.failed) == (rows, sum(number % 10 < 7 for number in range(rows)))


class Busy(Base):
    """Raises TransientError the first times that it sees a bad key, as often as `word` says."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.left = int(options.word)

    def check(self, batch: pa.RecordBatch) -> None:
        if set(batch.column("key").to_pylist()) & set(self.options.bad) and self.left:
            self.left -= 1
            raise TransientError("the endpoint is busy")


@pytest.mark.parametrize(("times", "failed"), [(2, 0), (1000, 1)])
def test_a_transient_error_is_tried_again(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, times: int, failed: int
) -> None:
    monkeypatch.setattr(answering, "TRANSIENT_PAUSE_S", 0.001)
    stage = Busy(Options(word=str(times), bad=[key(2)]))
    result = do(layout, plan(layout, stage), stage, batch_rows=1)
    assert (result.ok, result.failed) == (16 - failed, failed)
    line = Busy.check.__code__.co_firstlineno + 3
    expected = ("failed", f"TransientError: the endpoint is busy (test_task.py:{line})") if failed else ("ok", None)
    assert read(layout, "note_status", "note_error")[2] == expected


# --- processes that die ---


def test_a_row_whose_process_dies_fails_alone(workspace: Make) -> None:
    made = workspace(
        stages=section("Dies", bad=f'["{key(5)}"]', log='"seen.log"') + "\n[stages.note.run]\nbatch_rows = 2\n"
    )
    (made.folder / "note.sql").write_text(SQL)
    ingest_here(made.load())
    done = made.process("stage", "note", check=False, cwd=made.folder)
    assert done.returncode == 3, done.stderr
    assert "note: 16 rows, 15 ok, 1 failed in" in done.stderr
    assert made.rows("select row, note_error from samples where note_status = 'failed'") == [
        (5, "ProcessDied: the process died twice in this row")
    ]
    assert made.rows("select count(*) from samples where note_status = 'ok'") == [(15,)]
    seen = (made.folder / "seen.log").read_text().split()
    assert seen.count(uid(5)) == 4  # twice in the batch of two, twice alone
    assert seen.count(uid(4)) == 3  # twice in the batch of two, once alone
    assert {number: seen.count(uid(number)) for number in range(8, 16)} == dict.fromkeys(range(8, 16), 1)


def died(path: Path, shard: str, rows: list[int], *ahead: tuple[str, list[int]]) -> InHand:
    """What the next process knows after one that died in a batch, perhaps with others prepared ahead."""
    pid = subprocess.Popen([sys.executable, "-c", ""])
    pid.wait()
    InHand(path).begin(shard, rows, ahead)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "pid": pid.pid}))
    return InHand(path, "SIGSEGV")


def test_deaths_are_halved_down_to_a_row(tmp_path: Path) -> None:
    path = tmp_path / "batch.json"
    assert InHand(path).groups("a") == []
    assert died(path, "a", [1, 2, 3, 4]).groups("a") == [[1, 2, 3, 4]]
    assert died(path, "a", [1, 2, 3, 4]).groups("a") == [[1, 2], [3, 4]]
    assert died(path, "a", [3, 4]).groups("a") == [[1, 2], [3, 4]]
    known = died(path, "a", [3, 4])
    assert known.groups("a") == [[1, 2], [3], [4]]
    assert known.groups("b") == []
    assert known.verdict("a", [3]) is Verdict.AGAIN
    died(path, "a", [4])
    known = died(path, "a", [4])
    assert known.verdict("a", [4]) is Verdict.FAILED
    assert known.verdict("b", [4]) is Verdict.AGAIN
    assert known.verdict("a", []) is Verdict.AGAIN


def killed(path: Path, shard: str, rows: list[int], answered: int) -> InHand:
    """The same after a process that the system killed, which had answered so many rows."""
    pid = subprocess.Popen([sys.executable, "-c", ""])
    pid.wait()
    InHand(path, "").begin(shard, rows, answered=answered)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "pid": pid.pid}))
    return InHand(path, "SIGKILL")


def test_a_row_in_which_the_system_kills_has_failed_only_if_others_were_answered_between(tmp_path: Path) -> None:
    path = tmp_path / "batch.json"
    assert killed(path, "a", [4], 7).verdict("a", [4]) is Verdict.AGAIN
    known = killed(path, "a", [4], 0)
    assert (known.verdict("a", [4]), known.is_last("a"), known.is_last("b")) == (Verdict.LEFT, True, False)
    assert known.verdict("a", [4], answered=1) is Verdict.AGAIN  # another shard was done before it is tried again
    assert killed(path, "a", [4], 1).verdict("a", [4]) is Verdict.FAILED


def test_a_row_that_died_beside_others_that_are_answered_now_has_failed_alone(tmp_path: Path) -> None:
    path = tmp_path / "batch.json"
    for _ in range(2):
        killed(path, "a", [4, 5], 0)
    assert killed(path, "a", [5], 1).verdict("a", [5]) is Verdict.AGAIN
    assert killed(path, "a", [5], 0).verdict("a", [5]) is Verdict.FAILED


def test_part_of_a_batch_that_died_carries_its_deaths(tmp_path: Path) -> None:
    """A copy of the task has committed the other rows: what is left stands in one group, not in two."""
    path = tmp_path / "batch.json"
    died(path, "a", [1, 2, 3, 4])
    assert died(path, "a", [3, 4]).groups("a") == [[1, 2], [3], [4]]


def test_a_batch_in_the_hand_of_a_process_that_lives_is_no_death(tmp_path: Path) -> None:
    InHand(tmp_path / "batch.json").begin("a", [1])
    for _ in range(3):
        assert InHand(tmp_path / "batch.json").groups("a") == []


def test_what_is_answered_is_committed_before_a_batch_that_died(layout: Layout) -> None:
    stage = Counting()
    run = plan(layout, stage)
    died(run.in_hand(0), "00000000", [4, 5])
    done: list[int] = []

    class Looking(Counting):
        def check(self, batch: pa.RecordBatch) -> None:
            if key(4) in batch.column("key").to_pylist():
                done.extend(number for number, note in enumerate(notes(layout)) if note)

    stage = Looking()
    do(layout, run, stage)
    assert stage.seen[:3] == [[0, 1, 2, 3], [6, 7], [4, 5]]
    assert done == [0, 1, 2, 3, 6, 7]
    assert not run.in_hand(0).exists()


# --- batches prepared ahead ---


class Ahead(Base, Preparing):
    """Makes its answers in `prepare`, in another thread; `process` hands them on."""

    def __init__(self, options: Options = Options()) -> None:  # noqa: B008
        super().__init__(options)
        self.prepared: list[tuple[list[int], bool]] = []
        self.before: Callable[[], object] = lambda: None
        self.waits = False
        self.began = {number: threading.Event() for number in range(16)}

    def prepare(self, batch: pa.RecordBatch) -> list[str]:
        numbers = [int(uid, 16) for uid in batch.column("uid").to_pylist()]
        self.prepared.append((numbers, threading.current_thread() is threading.main_thread()))
        for number in numbers:
            self.began[number].set()
        self.check(batch)
        return [f"ahead: {text}" for text in batch.column("text").to_pylist()]

    def process(self, batch: pa.RecordBatch, prepared: list[str] | None = None) -> pa.RecordBatch:
        assert prepared is not None
        self.before()
        following = int(batch.column("uid")[-1].as_py(), 16) + 1
        last = min(following + 2 * self.resources.ahead, 16) - 1
        if following < 16 and self.waits:  # the next ones are prepared while this one is processed
            assert self.began[last].wait(60)
        return pa.RecordBatch.from_pydict({"note": prepared}, schema=self.schema)


class AheadFails(Ahead):
    """Raises for the bad keys in `prepare`."""

    check = Fails.check


class AheadBusy(Ahead):
    """Is busy the first time that it sees a bad key in `prepare`."""

    def check(self, batch: pa.RecordBatch) -> None:
        if set(batch.column("key").to_pylist()) & set(self.options.bad):
            self.options.bad.clear()
            raise TransientError("the endpoint is busy")


class GivesUp(Ahead):
    """Can give up, though nothing of it goes on outside."""

    given_up = 0

    def give_up(self) -> None:
        self.given_up += 1


def test_a_stop_begins_nothing_that_is_not_under_way(layout: Layout) -> None:
    stage, asked = GivesUp(), []
    stage.before = lambda: asked.append(len(asked))
    result = do(layout, plan(layout, stage), stage, batch_rows=2, stopping=lambda: bool(asked))
    assert (len(asked), result.ok, result.stopped) == (1, 2, True)
    assert stage.given_up >= 1


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_the_next_batches_are_prepared_while_one_is_processed(layout: Layout, ahead: int) -> None:
    """Those of the next shard, too."""
    stage = Ahead()
    stage.resources = Resources(ahead=ahead)
    stage.waits = True
    do(layout, plan(layout, stage), stage, batch_rows=2)
    assert notes(layout) == [f"ahead: {caption(i)}" for i in range(16)]
    assert stage.prepared == [([i, i + 1], False) for i in range(0, 16, 2)]


def test_a_shard_that_is_left_takes_what_was_read_of_it_along(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches that are prepared are not processed, and the next shard is done."""
    commit = commits.commit

    def refused(layout: Layout, shard: str, *args: Any, **options: Any) -> Any:
        if shard == "00000000":
            raise ShardError("it cannot be used")
        return commit(layout, shard, *args, **options)

    monkeypatch.setattr(commits, "commit", refused)
    stage = Ahead()
    stage.resources = Resources(ahead=3)
    result = do(layout, plan(layout, stage), stage, batch_rows=2, checkpoint_rows=2)
    assert (result.refused, result.ok) == ({"00000000": "it cannot be used"}, 8)
    assert notes(layout) == [None] * 8 + [f"ahead: {caption(i)}" for i in range(8, 16)]


def test_a_swept_attempt_is_done_again_behind_what_was_read_ahead(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, attempts = commits.commit, []

    def swept(*args: Any, attempt: str, **options: Any) -> Any:
        attempts.append(attempt)
        if len(attempts) == 1:
            raise Swept("this attempt was swept")
        return commit(*args, attempt=attempt, **options)

    monkeypatch.setattr(commits, "commit", swept)
    stage = Ahead()
    stage.resources = Resources(ahead=5)
    assert do(layout, plan(layout, stage), stage, batch_rows=2).ok == 16
    assert notes(layout) == [f"ahead: {caption(i)}" for i in range(16)]
    assert len(set(attempts)) == 3  # the swept one, that of the other shard, a new one


@pytest.mark.parametrize("shard", ["00000000", "00000001"])
def test_an_attempt_that_is_swept_at_its_last_commit_is_done_again(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    commit, attempts = commits.commit, []

    def swept(layout: Layout, name: str, *args: Any, attempt: str, **options: Any) -> Any:
        attempts.append(attempt)
        if (
            name == shard
            and len([a for a in attempts if a == attempt]) == 1
            and len(set(attempts)) <= 1 + (shard[-1] == "1")
        ):
            raise Swept("this attempt was swept")
        return commit(layout, name, *args, attempt=attempt, **options)

    monkeypatch.setattr(commits, "commit", swept)
    stage, seen = Note(Options()), []
    result = do(layout, plan(layout, stage), stage, batch_rows=4, progress=lambda done, failed: seen.append(done))
    assert (result.ok, result.left) == (16, {})
    assert notes(layout) == [f"seen: {caption(i)}" for i in range(16)]
    assert max(seen) == 16


@pytest.mark.parametrize("kind", [Note, Ahead])
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_batch_that_cannot_be_noted_costs_its_shard_alone(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, kind: type[Base], failing: int
) -> None:
    begin, calls = InHand.begin, [0]

    def full(self: InHand, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        begin(self, *args)

    monkeypatch.setattr(InHand, "begin", full)
    stage = kind(Options())
    stage.resources = Resources(ahead=3)
    result = do(layout, plan(layout, stage), stage, batch_rows=4)
    assert len(result.left) == 1
    done = [note is not None for note in notes(layout)]
    for number, shard in enumerate(layout.shard_names()):
        assert shard in result.left or all(done[8 * number : 8 * number + 8])
    assert result.ok == sum(done) >= 8  # what was answered before of the shard that is left, too


def test_a_log_that_cannot_be_written_hides_no_other_error(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is left while a commit with failures that keep an old answer is being made."""
    do(layout, plan(layout, Note(Options())), Note(Options()))
    stage = Fails(Options(word="again", bad=[key(0)]))
    real_read, real_commit = ShardWork.read, commits.commit

    def full(path: Path, values: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def bad(self: Any, group: Any, preparing: Any) -> Any:
        if self.part.shard == "00000000" and group.positions[0] == 4:
            raise ShardError("it cannot be read")
        return real_read(self, group, preparing)

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return real_commit(*args, **options)

    run = plan(layout, stage, Choice(redo=True))
    monkeypatch.setattr(files, "append_lines", full)
    monkeypatch.setattr(ShardWork, "read", bad)
    monkeypatch.setattr(commits, "commit", slow)
    result = do(layout, run, stage, batch_rows=4, checkpoint_rows=4)
    assert (result.refused, result.ok) == ({"00000000": "it cannot be read"}, 8)


def test_more_small_batches_are_read_ahead(workspace: Make) -> None:
    """Of shards with two rows each, as many are ahead as make up the batches that the stage asks for."""
    made = workspace({f"{i:08d}": samples(2, start=2 * i) for i in range(8)})
    ingest_here(made.load())
    stage = Ahead()
    stage.resources = Resources(ahead=2)
    seen = []
    stage.before = lambda: seen.append(stage.began[11].wait(60))  # of the sixth shard
    do(made.load().layout, plan(made.load().layout, stage), stage, batch_rows=5)
    assert seen[0]


class Some(Base):
    """Has no answer for the bad keys, and counts how often it is asked."""

    asked = 0

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self.asked += 1
        keys = batch.column("key").to_pylist()
        errors = {i: Slow("no answer within 60 s") for i, key in enumerate(keys) if key in self.options.bad}
        result = super().process(batch)
        if errors:
            raise RowsFailed(result, errors)
        return result


class Slow(Exception):
    kind = "timeout"


@pytest.mark.parametrize("row", [-1, 8])
def test_rows_that_are_none_of_the_batch_cannot_fail(layout: Layout, row: int) -> None:
    class Wrong(Base):
        def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
            raise RowsFailed(super().process(batch), {row: ValueError("no")})

    stage = Wrong(Options())
    with pytest.raises(StageError) as caught:
        do(layout, plan(layout, stage), stage, batch_rows=8)
    assert str(caught.value) == (
        f"stage 'note' says that row {row} of a batch of 8 failed\n"
        "  fix: raise RowsFailed with positions in the batch, from 0"
    )


@pytest.mark.parametrize("bad", [[0], [7], [2, 3], list(range(8)), [0, 2, 4, 6]], ids=str)
def test_rows_that_fail_beside_others_are_not_asked_again(layout: Layout, bad: list[int]) -> None:
    stage = Some(Options(bad=[key(number) for number in bad]))
    result = do(layout, plan(layout, stage), stage, batch_rows=8)
    assert (result.ok, result.failed, stage.asked) == (16 - len(bad), len(bad), 2)
    assert read(layout, "note_status", "note_error", "note") == [
        ("failed", "timeout: no answer within 60 s", None) if i in bad else ("ok", None, f"seen: {caption(i)}")
        for i in range(16)
    ]


def test_a_row_that_cannot_be_prepared_fails_alone(layout: Layout) -> None:
    stage = AheadFails(Options(bad=[key(5)]))
    do(layout, plan(layout, stage), stage, batch_rows=4)
    found = read(layout, "note_status", "note_error", "note")
    assert found[5] == ("failed", cannot(key(5)), None)
    assert [row for i, row in enumerate(found) if i != 5] == [
        ("ok", None, f"ahead: {caption(i)}") for i in range(16) if i != 5
    ]
    assert [numbers for numbers, here in stage.prepared if here] == [[4, 5], [4], [5], [6, 7]]


def test_a_transient_error_of_prepare_is_tried_again(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "TRANSIENT_PAUSE_S", 0.001)
    stage = AheadBusy(Options(bad=[key(5)]))
    assert do(layout, plan(layout, stage), stage).ok == 16
    assert [numbers for numbers, here in stage.prepared if here] == [[4, 5, 6, 7]]


def test_rows_are_in_hand_before_they_are_prepared(layout: Layout) -> None:
    """Whatever batch the process dies in, the file names it."""
    stage = Ahead()
    run = plan(layout, stage)
    told: list[tuple[tuple[str, list[int]], list[tuple[str, list[int]]]]] = []

    def look(batch: pa.RecordBatch) -> None:
        data = json.loads(run.in_hand(0).read_text())["in_hand"]
        groups = [(group["shard"], group["rows"]) for group in (data, *data["ahead"])]
        assert (batch.column("shard")[0].as_py(), batch.column("row").to_pylist()) in groups
        told.append((groups[0], groups[1:]))

    stage.check = look  # type: ignore[method-assign]
    do(layout, run, stage, batch_rows=4)
    first, second = ("00000000", [0, 1, 2, 3]), ("00000000", [4, 5, 6, 7])
    third, fourth = ("00000001", [0, 1, 2, 3]), ("00000001", [4, 5, 6, 7])
    assert told == [(("", []), [first]), (first, [second]), (second, [third]), (third, [fourth])]


def test_a_batch_that_died_is_not_prepared_ahead(layout: Layout) -> None:
    stage = Ahead()
    run = plan(layout, stage)
    died(run.in_hand(0), "00000000", [4, 5])
    beside = []

    def look() -> None:
        data = json.loads(run.in_hand(0).read_text())["in_hand"]
        beside.append((data["rows"], [group["rows"] for group in data["ahead"]]))

    stage.before = look
    do(layout, run, stage, batch_rows=4)
    assert beside[2] == ([4, 5], [])  # nor is another one prepared beside it
    assert stage.prepared[:3] == [([0, 1, 2, 3], False), ([6, 7], False), ([4, 5], True)]
    assert stage.prepared[3:] == [([8, 9, 10, 11], False), ([12, 13, 14, 15], False)]


def test_of_two_batches_in_hand_neither_is_blamed(tmp_path: Path) -> None:
    """Each stands alone from then on, and only a death in which it was alone counts."""
    path = tmp_path / "batch.json"
    known = died(path, "a", [1, 2], ("a", [3, 4]))
    assert known.groups("a") == [[1, 2], [3, 4]]
    assert died(path, "a", [3, 4]).groups("a") == [[1, 2], [3, 4]]
    assert died(path, "a", [3, 4]).groups("a") == [[1, 2], [3], [4]]
    across = died(tmp_path / "across.json", "a", [1, 2], ("a", [3]), ("b", [1, 2]))
    assert (across.groups("a"), across.groups("b")) == ([[1, 2], [3]], [[1, 2]])
    assert died(tmp_path / "single.json", "a", [1], ("a", [2])).verdict("a", [1]) is Verdict.AGAIN
    assert died(tmp_path / "single.json", "a", [1]).verdict("a", [1]) is Verdict.AGAIN
    assert died(tmp_path / "single.json", "a", [1]).verdict("a", [1]) is Verdict.FAILED


# --- alone and in a batch ---


class Leaking(Base):
    """Adds a number that depends on how many rows stand beside; it says by how much it may."""

    outputs = (Value("note", pa.string(), "text"), Value("number", pa.list_(pa.float64()), "a number"))
    leak = 0.0

    def __init__(self, tolerance: float | None, leak: float) -> None:
        super().__init__(Options())
        self.leak, self.sizes = leak, []
        if tolerance is not None:
            self.tolerance = tolerance

    sizes: list[int]

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self.sizes.append(batch.num_rows)
        values = [[1.0 + self.leak * batch.num_rows]] * batch.num_rows
        return pa.RecordBatch.from_pydict({"note": ["a"] * batch.num_rows, "number": values}, schema=self.schema)


def test_a_stage_that_lets_rows_change_each_other_is_refused(layout: Layout) -> None:
    stage = Leaking(0.25, 0.125)
    with pytest.raises(StageError) as caught:
        do(layout, plan(layout, stage), stage, batch_rows=4)
    assert str(caught.value) == (
        "stage 'note' gives a row another answer alone than in a batch of 4\n"
        "  shard: 00000000\n"
        "  row: 0\n"
        "  alone: {'note': 'a', 'number': [1.125]}\n"
        "  in the batch: {'note': 'a', 'number': [1.5]}\n"
        "  difference: 0.375\n"
        "  tolerance: 0.25\n"
        "  fix: its model lets rows of one batch change each other: use another model, or batch_rows = 1 in "
        "[stages.note.run]"
    )
    assert notes(layout) == [None] * 16


@pytest.mark.parametrize(
    ("tolerance", "batch_rows", "difference", "sizes"),
    [
        (0.375, 4, 0.375, [4, 1, 1, 1, 4, 4, 4]),
        (0.375, 2, 0.125, [2, 1, 1, 2, 2, 2, 2, 2, 2, 2]),
        (0.0, 1, None, [1] * 16),
        (None, 4, None, [4] * 4),
    ],
)
def test_a_stage_that_keeps_its_tolerance_goes_on(
    layout: Layout, tolerance: float | None, batch_rows: int, difference: float | None, sizes: list[int]
) -> None:
    stage = Leaking(tolerance, 0.125)
    result = do(layout, plan(layout, stage), stage, batch_rows=batch_rows)
    assert (result.ok, result.difference, stage.sizes) == (16, difference, sizes)


def test_a_stage_may_measure_the_difference_itself(layout: Layout) -> None:
    stage = Leaking(7.0, 0.125)
    stage.difference = lambda alone, within: 8.0  # type: ignore[attr-defined]
    with pytest.raises(StageError) as caught:
        do(layout, plan(layout, stage), stage, batch_rows=4)
    assert caught.value.where["difference"] == "8"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 1.5, 0.5),
        (float("nan"), float("nan"), 0.0),
        (float("nan"), 1.0, float("inf")),
        (None, 1.0, float("inf")),
        ("a", "a", 0.0),
        ("a", "b", float("inf")),
        ([1.0, 2.0], [1.0, 2.25], 0.25),
        ([1.0], [1.0, 2.0], float("inf")),
        ({"x": 1.0, "y": "a"}, {"x": 3.0, "y": "a"}, 2.0),
        (b"a", b"b", float("inf")),
        (1, 2, float("inf")),
    ],
    ids=str,
)
def test_differences_of_answers(a: Any, b: Any, expected: float) -> None:
    batches = [pa.RecordBatch.from_pylist([{"value": value}]) for value in (a, b)]
    assert difference(*batches) == expected


# --- notes ---


class Noting(Base):
    """Has something to say of every batch."""

    def take_notes(self) -> list[dict[str, Any]]:
        return [{"kind": "refusal", "text": "I cannot — no"}] * self.notes.pop(0)

    notes: ClassVar[list[int]] = []


def test_what_a_stage_notes_is_kept_beside_the_run(layout: Layout) -> None:
    stage = Noting(Options())
    Noting.notes[:] = [1, 0, 2, 0]
    run = plan(layout, stage)
    do(layout, run, stage, batch_rows=4)
    assert run.notes(0).read_text() == '{"kind": "refusal", "text": "I cannot — no"}\n' * 3


# --- checkpoints ---


def test_a_commit_runs_beside_the_next_batch(many: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts one batch early, so that of 8 rows a kill costs never more than 8: 7 in flight and 1 in hand."""
    rows = 8
    commit, committed, most = commits.commit, [0], [0]
    ninth = threading.Event()

    class Looking(Counting):
        def check(self, batch: pa.RecordBatch) -> None:
            most[0] = max(most[0], len(self.seen) - committed[0])
            if len(self.seen) == rows:
                eighth.set()
            if len(self.seen) > rows:
                ninth.set()

    eighth = threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        assert eighth.wait(60)  # the next batch is processed meanwhile
        if committed[0] == 0:
            assert not ninth.wait(0.2)  # and the one behind it is not
        result = commit(*args, **options)
        committed[0] += result.rows
        return result

    monkeypatch.setattr(commits, "commit", slow)
    stage = Looking()
    do(many, plan(many, stage), stage, checkpoint_rows=rows, batch_rows=1)
    assert most == [rows]
    assert notes(many) == [f"seen: {caption(i)}" for i in range(160)]
    assert generations(many, "00000000") == 12  # of 7 rows, and one of 3


@pytest.mark.parametrize("failing", [1, 2], ids=["in flight", "last"])
def test_a_commit_that_fails_leaves_its_shard_and_the_next_is_done(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    commit, calls = commits.commit, [0]

    def full(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(*args, **options)

    monkeypatch.setattr(commits, "commit", full)
    stage = Counting()
    run = plan(layout, stage)
    result = do(layout, run, stage, checkpoint_rows=8, batch_rows=1)
    assert result.left == {"00000000": str(machine.explained(OSError(errno.ENOSPC, "")))}
    monkeypatch.setattr(commits, "commit", commit)
    assert [note is not None for note in notes(layout)] == [failing == 2] * 7 + [False] + [True] * 8
    assert do(layout, run, Counting()).ok == 16


def test_a_commit_in_flight_is_awaited_beside_another_error(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage breaks its contract while the rows before are being committed: they are, their failures are told."""
    first, again = Note(Options()), Fails(Options(word="again", bad=[key(3)]))
    do(layout, plan(layout, first), first)
    commit, broken = commits.commit, threading.Event()
    process = again.process

    def breaks(batch: pa.RecordBatch) -> pa.RecordBatch | None:
        if batch.column("row")[0].as_py() == 7:
            broken.set()
            return None
        return process(batch)

    def slow(*args: Any, **options: Any) -> Any:
        assert broken.wait(60)
        return commit(*args, **options)

    again.process = breaks  # type: ignore[method-assign,assignment]
    monkeypatch.setattr(commits, "commit", slow)
    run = plan(layout, again, Choice(redo=True))
    with pytest.raises(StageError, match="did you forget the return statement"):
        do(layout, run, again, checkpoint_rows=8, batch_rows=1)
    assert notes(layout)[:8] == [f"{'seen' if i in (3, 7) else 'again'}: {caption(i)}" for i in range(8)]
    assert [json.loads(line)["row"] for line in run.failures(0).read_text().splitlines()] == [3]


def generations(layout: Layout, shard: str, stage: str = "note") -> int:
    return column_files.newest(layout, shard).get(stage, 0)


@pytest.mark.parametrize(
    ("options", "commits"),
    [
        ({"checkpoint_rows": 3, "batch_rows": 2}, 2),
        ({"checkpoint_rows": 1, "batch_rows": 2}, 4),
        ({"checkpoint_rows": 1000, "batch_rows": 2}, 1),
        ({"checkpoint_seconds": 0.0, "batch_rows": 2}, 4),
    ],
)
def test_a_checkpoint_commits_every_n_rows_or_t_seconds(layout: Layout, options: dict[str, Any], commits: int) -> None:
    stage = Note(Options())
    do(layout, plan(layout, stage), stage, **options)
    assert [generations(layout, shard) for shard in ("00000000", "00000001")] == [commits, commits]
    assert notes(layout) == [f"seen: {caption(i)}" for i in range(16)]


def test_a_task_done_twice_does_nothing_the_second_time(layout: Layout) -> None:
    run = plan(layout, Note(Options()))
    first = do(layout, run, Note(Options()))
    stage = Counting()
    second = do(layout, run, stage)
    assert stage.seen == []
    assert (second.rows, second.ok, second.dropped) == (first.rows, first.ok, first.dropped) == (16, 16, 0)
    assert generations(layout, "00000000") == 1


def test_a_shard_without_rows_to_do_is_healed_first(layout: Layout) -> None:
    """A kill after the last commit and before the fold leaves a partition that is behind."""
    run = plan(layout, Note(Options()))
    before = layout.partition("00000000").read_bytes()
    do(layout, run, Note(Options()))
    layout.partition("00000000").write_bytes(before)
    stage = Counting()
    do(layout, run, stage)
    assert stage.seen == []
    assert not partitions.is_behind(layout, "00000000")


def test_rows_of_another_run_are_dropped_and_counted(layout: Layout) -> None:
    late, now = plan(layout, Note(Options())), plan(layout, Note(Options()), sql=f"{SQL} where row < 3")
    do(layout, now, Note(Options(word="now")))
    stage = Counting(Options(word="late"))
    result = do(layout, late, stage)
    assert (result.rows, result.ok, result.dropped) == (10, 10, 6)
    assert stage.seen == [[3, 4, 5, 6], [7], [11, 12, 13, 14], [15]]
    assert notes(layout) == [f"{'now' if i % 8 < 3 else 'late'}: {caption(i)}" for i in range(16)]


def test_progress_counts_rows_that_are_done_already(layout: Layout) -> None:
    run = plan(layout, Note(Options()))
    do(layout, plan(layout, Note(Options()), sql=f"{SQL} where row < 3"), Note(Options()))
    told: list[tuple[int, int]] = []
    do(layout, run, Fails(Options(bad=[key(9), key(12)])), progress=lambda done, failed: told.append((done, failed)))
    assert told == [(7, 0), (8, 0), (15, 1), (16, 1)]


def test_a_task_that_is_asked_to_stop_commits_what_it_has(layout: Layout) -> None:
    stage = Counting()
    run = plan(layout, stage)
    result = do(layout, run, stage, batch_rows=2, stopping=lambda: len(stage.seen) >= 3)
    assert (result.stopped, result.rows, result.ok) == (True, 6, 6)
    assert notes(layout) == [f"seen: {caption(i)}" for i in range(6)] + [None] * 10
    again = Counting()
    assert do(layout, run, again).ok == 16
    assert again.seen == [[6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_shard_that_was_ingested_again_is_left(dataset: Workspace) -> None:
    layout = dataset.load().layout
    run = plan(layout, Note(Options()))
    make_shard(dataset.folder / "source/00000000.tar", samples(5))
    ingest_here(dataset.load())
    result = do(layout, run, Note(Options()))
    assert list(result.refused) == ["00000000"]
    assert result.refused["00000000"].startswith(
        "the shard was ingested again with other rows since this work was planned\n  rows: expected "
    )
    assert (result.rows, result.ok) == (8, 8)
    assert notes(layout) == [None] * 5 + [f"seen: {caption(i)}" for i in range(8, 16)]


class Sized(Base):
    """Needs the image's bytes of some rows only."""

    members = ("image",)

    def needs_bytes(self, batch: pa.RecordBatch) -> list[bool]:
        return [text != caption(1) for text in batch.column("text").to_pylist()]

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        sizes = [None if data is None else str(len(data)) for data in batch.column("image").to_pylist()]
        return pa.RecordBatch.from_pydict({"note": sizes}, schema=self.schema)


def test_a_stage_gets_the_bytes_that_it_asks_for(layout: Layout) -> None:
    stage = Sized(Options())
    do(layout, plan(layout, stage), stage)
    sizes = [str(len(sample.image or b"")) for sample in samples(16)]
    assert notes(layout) == [sizes[0], None, *sizes[2:]]


def test_a_shard_whose_bytes_are_gone_is_left(dataset: Workspace) -> None:
    layout = dataset.load().layout
    run = plan(layout, Sized(Options()))
    (dataset.folder / "source/00000001.tar").unlink()
    result = do(layout, run, Sized(Options()))
    assert result.refused == {
        "00000001": "the source shard cannot be read: No such file or directory\n"
        f"  file: {dataset.folder}/source/00000001.tar\n"
        "  fix: put it back, or ingest it as it is now: builder ingest"
    }
    assert (result.rows, result.ok) == (8, 8)


def in_another_order(path: Path) -> None:
    """Writes the samples of a shard in reverse, the file's size unchanged."""
    size = path.stat().st_size
    make_shard(path, list(reversed(samples(8))))
    assert path.stat().st_size == size


def test_a_shard_that_was_only_touched_is_read(dataset: Workspace) -> None:
    layout = dataset.load().layout
    run = plan(layout, Sized(Options()))
    os.utime(dataset.folder / "source/00000000.tar")
    result = do(layout, run, Sized(Options()))
    assert (result.ok, result.left) == (16, {})
    sizes = [str(len(sample.image or b"")) for sample in samples(16)]
    assert notes(layout) == [sizes[0], None, *sizes[2:]]


def test_a_shard_whose_headers_moved_is_left(dataset: Workspace) -> None:
    layout = dataset.load().layout
    run = plan(layout, Sized(Options()))
    path = dataset.folder / "source/00000000.tar"
    in_another_order(path)
    result = do(layout, run, Sized(Options()))
    assert result.refused == {
        "00000000": "the source shard changed since it was ingested\n"
        f"  file: {path}\n"
        "  offset: 0\n"
        f"  member: expected '{key(0)}.jpg' of {len(samples(1)[0].image or b'')} bytes\n"
        "  fix: put it back, or ingest it as it is now: builder ingest"
    }
    assert (result.rows, result.ok) == (8, 8)
    ingest_here(dataset.load())
    assert do(layout, plan(layout, Sized(Options())), Sized(Options())).ok == 8
    sizes = [str(len(sample.image or b"")) for sample in samples(8)]
    assert notes(layout)[:8] == [*reversed(sizes[2:]), None, sizes[0]]


def test_headers_are_compared_once_and_only_of_a_touched_shard(
    dataset: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = dataset.load().layout
    calls: list[int] = []
    real = head_check.first_other_head

    def counted(heads: Any, names: Any, sizes: Any) -> Any:
        calls.append(len(heads))
        return real(heads, names, sizes)

    monkeypatch.setattr(head_check, "first_other_head", counted)
    run = plan(layout, Sized(Options()))
    os.utime(dataset.folder / "source/00000001.tar")
    assert do(layout, run, Sized(Options()), batch_rows=1).ok == 16
    assert calls == [24]


def test_a_shard_of_another_size_is_left(dataset: Workspace) -> None:
    layout = dataset.load().layout
    run = plan(layout, Sized(Options()))
    path = dataset.folder / "source/00000000.tar"
    size = path.stat().st_size
    with path.open("ab") as shard:
        shard.write(bytes(512))
    result = do(layout, run, Sized(Options()))
    assert result.refused == {
        "00000000": "the source shard changed since it was ingested\n"
        f"  file: {path}\n"
        f"  bytes: expected {size}, found {size + 512}\n"
        "  fix: put it back, or ingest it as it is now: builder ingest"
    }


# --- generated bytes ---


class PaintOptions(Strict):
    """Options of Paint."""


class Paint(Stage):
    """Generates the caption's bytes; nothing for row 1."""

    name = "paint"
    version = "1"
    Options = PaintOptions
    inputs = Base.inputs
    outputs = (Bytes("image", "a picture", extension="jpg"),)
    resources = Base.resources

    def __init__(self, options: PaintOptions) -> None:
        self.options = options
        self.after: Callable[[], object] = lambda: None

    def setup(self, device: str) -> None:
        """Holds nothing."""

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self.after()
        texts = batch.column("text").to_pylist()
        images = [None if text == caption(1) else text.encode() for text in texts]
        return pa.RecordBatch.from_pydict({"image": images}, schema=self.schema)

    def close(self) -> None:
        """Holds nothing."""


def check_painted(layout: Layout) -> None:
    for number, (path, offset, size, sha256) in enumerate(
        read(layout, "image_path", "image_offset", "image_size", "image_sha256")
    ):
        if number == 1:
            assert (path, offset, size, sha256) == (None,) * 4
            continue
        tar = (layout.root / path).read_bytes()
        assert tar[offset : offset + size] == caption(number).encode()
        assert tar.endswith(bytes(1024))
        with tarfile.open(layout.root / path) as archive:
            assert f"{number % 8:08d}.jpg" in archive.getnames()


def test_generated_bytes_lie_in_one_closed_tar_a_checkpoint(layout: Layout) -> None:
    stage = Paint(PaintOptions())
    run = plan(layout, stage)
    do(layout, run, stage, checkpoint_rows=4, batch_rows=2)
    check_painted(layout)
    tars = sorted(path.name for path in (layout.edits / "00000000").iterdir())
    assert len(tars) == 2
    attempt = tars[0].removesuffix("-0.tar")
    assert attempt.startswith(run.folder.name)
    assert tars == [f"{attempt}-0.tar", f"{attempt}-1.tar"]


def test_a_tar_is_complete_before_its_rows_are_committed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = commits.commit
    looked: list[int] = []

    def looking(*args: Any, **options: Any) -> Any:
        for path in {path for path in args[4]["image_path"].to_pylist() if path}:
            with tarfile.open(layout.root / path) as archive:
                looked.append(len(archive.getnames()))
        return commit(*args, **options)

    monkeypatch.setattr(commits, "commit", looking)
    stage = Paint(PaintOptions())
    do(layout, plan(layout, stage), stage, checkpoint_rows=4)
    assert looked == [3, 4, 4, 4]


def test_a_tar_is_durable_before_the_rows_that_point_to_it(layout: Layout, disk: list[str]) -> None:
    stage = Paint(PaintOptions())
    run = plan(layout, stage)
    disk.clear()
    do(layout, run, stage, checkpoint_rows=4)
    tars = [happened for happened in disk if happened.startswith("rename") and happened.endswith(".tar")]
    assert len(tars) == 4
    for i, tar_named in enumerate(tars):
        at = disk.index(tar_named)
        folder = f"fsync {i // 2:08d}/"
        assert disk[at - 1 : at + 2] == ["fsync TEMP", tar_named, folder]
        after = [happened for happened in disk[at + 2 :] if happened.startswith("link paint")]
        before = [happened for happened in disk[:at] if happened.startswith("link paint")]
        assert (len(before), len(after)) == (i, 4 - i)


def test_a_task_that_fails_leaves_no_half_tar(layout: Layout) -> None:
    stage = Paint(PaintOptions())
    run = plan(layout, stage)
    process = stage.process
    stage.process = lambda batch: process(batch) if batch.column("row")[0].as_py() == 0 else None  # type: ignore[method-assign]
    with pytest.raises(StageError):
        do(layout, run, stage)
    assert list((layout.edits / "00000000").iterdir()) == []


@pytest.mark.parametrize("commits", [0, 1])
def test_a_swept_attempt_starts_again_under_a_new_name(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    """A sweep finds a closed tar whose rows are just being committed, the first one or a later one of the attempt."""
    stage = Paint(PaintOptions())
    run = plan(layout, stage)
    real, calls = files.create_only, [0]

    def create_only(path: Path, write: Any) -> bool:
        if "paint" in path.name:
            calls[0] += 1
            if calls[0] == commits + 1:
                monkeypatch.setattr(files, "create_only", real)
                sweep = sweeps.Sweep()
                sweeps.sweep_shard(layout, "00000000", ["paint"], sweep, dry_run=False)
                assert [path.suffix for path in sweep.paths] == [".tar"]
        return real(path, write)

    monkeypatch.setattr(files, "create_only", create_only)
    result = do(layout, run, stage, checkpoint_rows=4)
    assert (result.rows, result.ok, result.dropped) == (16, 16, 0)
    check_painted(layout)
    attempts = {path.name.rpartition("-")[0] for path in (layout.edits / "00000000").iterdir()}
    assert len(attempts) == commits + 1


# --- Ctrl-C ---


def test_ctrl_c_keeps_what_is_committed(workspace: Make) -> None:
    made = workspace(
        {"00000000": samples(24), "00000001": samples(24, start=24)},
        stages=section("Note", pause_s=0.2, log='"seen.log"'), workers=2, checkpoint_rows=4,
    )  # fmt: skip
    (made.folder / "note.sql").write_text(SQL)
    pipeline = made.load()
    ingest_here(pipeline)
    log = made.folder / "seen.log"
    command = [sys.executable, "-m", "builder", "stage", "note", "--pipeline", str(made.file)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=made.folder, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background have it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while min(generations(pipeline.layout, shard) for shard in ("00000000", "00000001")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert talk.splitlines()[-1] == "stopped: everything committed is kept; run the same command again to continue"
    before = log.read_text().split()
    assert len(before) == len(set(before)) < 48
    answered = made.rows("select uid from samples where note_status = 'ok'")
    assert {uid for (uid,) in answered} == set(before)  # every row that was looked at is committed
    made.run("stage", "note", cwd=made.folder)
    assert sorted(log.read_text().split()) == sorted(uid(number) for number in range(48))
    assert made.rows("select count(*) from samples where note is not null") == [(48,)]


def test_a_result_is_json() -> None:
    assert json.loads(json.dumps(Result(rows=3, left={"a": "gone"}).to_json())) == {
        "rows": 3, "ok": 0, "failed": 0, "kept": 0, "dropped": 0, "refused": {}, "left": {"a": "gone"},
        "stopped": False, "seconds": 0.0, "difference": None, "totals": {},
    }  # fmt: skip


def test_a_run_directory_is_all_that_a_task_needs(dataset: Workspace) -> None:
    run = RunFiles.at(plan(dataset.load().layout, Note(Options())).folder)
    assert sorted(path.name for path in run.folder.iterdir()) == ["tasks", "workset.parquet"]
    assert json.loads(run.task(0).read_text())["slices"][1] == {
        "shard": "00000001", "first": 8, "count": 8, "again": 0,
        "rows": partitions.partition_state(dataset.load().layout, "00000001").rows,  # type: ignore[union-attr]
    }  # fmt: skip
