"""One task: read rows ahead, ask the stage, commit checkpoints.

Owns status, retries, checkpoints and edits tars of a run's rows. A task is a run directory and a number; it keeps one
stage instance for all its shards. Three threads: while the main one asks the stage about a batch, one reads the batches
that follow (and prepares them, if the stage can), also those of the next shard, and one makes the last checkpoint
durable and commits it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from builder import formats, machine
from builder.engine.batches import Failure, Found, Left, Tally, answer, check_alone, error_text
from builder.engine.in_hand import Deaths, Verdict
from builder.engine.workset import Slice, read_slice, read_task
from builder.errors import BuilderError, ConflictError, MachineError, ShardError, StageError, TransientError
from builder.machine import Sort, asked_again
from builder.progress import plain_lines
from builder.sources.members import EDIT, NOT_READ, digests_of
from builder.sources.reader import MemberReader
from builder.stages.contract import Preparing, Stage, columns_of, formats_asked
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import commits, partitions, schema
from builder.table.commits import Swept
from builder.table.edits import EditsTar
from builder.table.schema import Column

#: Rows of a task after which the share of failures is judged.
JUDGED_AFTER = 100
#: Batches in a checkpoint from which a commit starts one batch early, so that this batch can be processed meanwhile.
#: Where a checkpoint holds fewer, that would be many more commits, and each is waited for.
EARLY_FROM = 8
#: Batches, of few rows each, that are read ahead for one of full size.
MOST_AHEAD = 8
#: Seconds between two looks at whether the run was stopped, for a stage that waits for something outside.
STOP_EVERY_S = 0.1
#: Shards in a row that a full disk or the like keeps from being done, after which a task stops.
SETBACKS = 3
#: Batches in a row, and rows in them, of which the machine lets none be answered, after which their shard is left if no
#: row that was answered before is answered now.
EMPTY_BATCHES, EMPTY_ROWS = 2, 16
#: Other rows of a shard that are tried, where none of a batch can be read.
PROBED = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskSettings:
    """What `run.json` says about execution."""

    checkpoint_rows: int
    checkpoint_seconds: float
    max_failed: float
    batch_rows: int


@dataclass
class Result:
    """What a task did, read off the table: what an earlier process or a copy of the task did counts too.

    Attributes:
        rows: rows that were tried: ok, failed and kept.
        ok: rows to which this run gave an answer.
        failed: rows that failed and stand so in the table.
        kept: rows that failed where an older answer stays.
        dropped: rows that another run answered meanwhile.
        refused: shards that were ingested again meanwhile, or whose source is gone or another, with the reason.
        left: shards that the machine kept from being done, with the reason: the same command does the rest of them.
        stopped: whether it was asked to stop before its end.
        difference: the largest one between an answer alone and in a batch; None for a stage that names no tolerance.
        totals: what the stage has counted itself.
    """

    rows: int = 0
    ok: int = 0
    failed: int = 0
    kept: int = 0
    dropped: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    seconds: float = 0.0
    difference: float | None = None
    totals: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_stage_task(
    layout: Layout,
    run: RunFiles,
    number: int,
    stage: Stage,
    settings: TaskSettings,
    *,
    device: str = "cpu",
    progress: Progress = lambda done, failed: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Result:
    """Does one task of a stage's run to its end, or until `stopping` says so; commits what is done either way.

    Raises:
        StageError: the stage cannot start or go on, broke its contract, or more than `max_failed` of the rows failed.
        TransientError: a full disk, want of memory or the like was in the way of shard after shard.
    """
    started = time.monotonic()
    task = _Task(layout, run, number, stage, settings, progress, stopping)
    with _giving_up(stage, stopping):
        stage.setup(device)
    try:
        with _giving_up(stage, stopping):
            task.run()
        task.result.totals = getattr(stage, "totals", dict)()
    finally:
        stage.close()
        with contextlib.suppress(OSError):  # it is of no use any more, and no reason to hide another error
            files.remove(run.in_hand(number))
    task.result.stopped = stopping()
    task.result.seconds = time.monotonic() - started
    return task.result


@contextlib.contextmanager
def _giving_up(stage: Stage, stopping: Callable[[], bool]) -> Iterator[None]:
    """Meanwhile, a stage that waits for something outside is told when the run is stopped."""
    give_up: Callable[[], None] | None = getattr(stage, "give_up", None)
    if give_up is None:
        yield
        return
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(STOP_EVERY_S):
            if stopping():
                give_up()

    watcher = threading.Thread(target=watch, name="stopping")
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


class Setbacks:
    """Shards in a row that the machine kept from being done: one is left for later, several mean that none does better.

    A disk that does not give one file may give the next: only what stands in the way of every file is counted.
    """

    def __init__(self) -> None:
        self._in_a_row = 0

    def end(self) -> None:
        """A shard was done."""
        self._in_a_row = 0

    def add(self, error: BaseException) -> tuple[TransientError, bool]:
        """Why a shard was left, and whether the others need not be tried."""
        why = machine.told(error) if not isinstance(error, TransientError) else error
        if machine.sort_of(error) in (None, Sort.ACCESS):
            return why, False
        self._in_a_row += 1
        if self._in_a_row < SETBACKS:
            return why, False
        why.where = {**why.where, "shards in a row": self._in_a_row}
        return why, True


@dataclass(frozen=True)
class _Group:
    """Positions in a shard's work that form a batch.

    Attributes:
        alone: the process died in it, nothing else may be in hand.
        since: of a row that the machine kept from being answered: how many rows had been answered then.
    """

    positions: list[int]
    alone: bool = False
    since: int | None = None


@dataclass(frozen=True)
class Batch:
    """Rows with what the stage is given, prepared ahead if it can be; one row without its bytes as failed or left.

    Attributes:
        digests: of the source's bytes in each row, as `<stage>_digest` has them.
        prepared: the result of the stage's `prepare`, or what it raised.
    """

    rows: list[int]
    given: pa.RecordBatch | Failure | Left
    digests: list[int]
    prepared: Future[Any] | None = None

    @property
    def under_way(self) -> Any | None:
        """What is prepared, if work on it goes on outside: it can be cancelled."""
        prepared = None if self.prepared is None or self.prepared.exception() else self.prepared.result()
        return prepared if hasattr(prepared, "cancel") else None


@dataclass(frozen=True)
class _InFlight:
    """A commit that is being made: its rows, and in the end the rows as committed and those that were kept."""

    rows: int
    result: Future[tuple[pa.Table, list[int]]]


@dataclass
class _Pending:
    """Rows that are answered and not committed."""

    rows: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    answers: list[pa.RecordBatch | Failure] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Step:
    """A group of rows of one shard, and what is being read for it."""

    shard: _Shard
    group: _Group
    following: Future[list[Batch]]


def _is_left(error: BaseException) -> bool:
    """Whether a shard is left for later: the error is the machine's, or the system's answer to the engine itself."""
    if isinstance(error, ConflictError | StageError):
        return False
    return isinstance(error, OSError | TransientError) or machine.is_of_the_machine(error)


class _Task:
    """The groups of a task, shard after shard: one in hand, those behind it read and prepared ahead."""

    def __init__(
        self,
        layout: Layout,
        run: RunFiles,
        number: int,
        stage: Stage,
        settings: TaskSettings,
        progress: Progress,
        stopping: Callable[[], bool],
    ) -> None:
        self._layout, self._run, self._number, self._stage = layout, run, number, stage
        self._settings, self._progress, self._stopping = settings, progress, stopping
        self._kind = type(stage)
        self._columns = columns_of(self._kind)
        self._generated = [output.name for output in self._kind.outputs if output.type == schema.GENERATED]
        self._deaths = Deaths(run.in_hand(number))
        self._setbacks = Setbacks()
        parts = read_task(run, number)
        self._waiting = deque(sorted(parts, key=lambda part: self._deaths.is_last(part.shard)))
        self._groups = self._grouped()
        self._window: deque[_Step] = deque()
        self._coming: deque[tuple[_Shard, _Group]] = deque()  # groups behind the window whose note is not written
        self._shards: list[_Shard] = []  # that are open, in order
        self._reader = ThreadPoolExecutor(1, "reader")
        self._done = self._failed = 0
        self._passed: dict[str, int] = {}  # rows of the shards behind, by shard
        self._ended: list[BuilderError] = []  # why the task cannot go on
        self.tally = Tally()
        self._witness: pa.RecordBatch | None = None  # the last row that was answered, as it was asked about
        self.result = Result()

    def run(self) -> None:
        """Asks the stage about every row that is left, and commits checkpoints."""
        with self._reader:
            try:
                while self._waiting and not self._ends():  # again for shards that are swept at their last commit
                    self._read_on()
                    while self._window and not self._ends():
                        step = self._window.popleft()
                        with self._leaving(step.shard.part):
                            self._do(step)
                        if not self._window:
                            self._read_on()
                    self._take_over()
                    self._forget(self._window)
                    for shard in list(self._shards):
                        with self._leaving(shard.part):
                            shard.checkpoint()
                            self._close(shard)
            finally:
                self._forget(self._window)
                for shard in self._shards:
                    shard.abandon()
        for why in self._ended:
            raise why

    def _ends(self) -> bool:
        return bool(self._ended) or self._stopping()

    def end(self, why: BuilderError | None) -> None:
        """Ends the task with what is answered, and with an error if one is given."""
        if why is not None and not self._ended:
            self._ended.append(why)

    def _take_over(self) -> None:
        """At the end of a task that is not done: what a stage that gives up was answered about batches ahead."""
        give_up = getattr(self._stage, "give_up", None)
        if give_up is None or not self._ends():
            return
        give_up()
        while self._window:
            step = self._window.popleft()
            with self._leaving(step.shard.part):
                step.shard.ask(
                    [batch for batch in step.following.result() if batch.under_way is not None], step.group, kills=False
                )

    def _do(self, step: _Step) -> None:
        """Asks the stage about one group, while those behind it are read."""
        shard, group = step.shard, step.group
        try:
            batches = step.following.result()
        except Exception as error:
            if not machine.is_out_of_memory(error) or len(group.positions) == 1:
                raise
            self._do_each(shard, group, shard.halved(group))
            return
        if group.alone:
            shard.checkpoint()  # what is answered is safe if the process dies here again
            shard.collect()
        shard.make_room(len(group.positions))
        self._close_before(shard, shard.exposed + len(group.positions))
        good = [row for batch in batches if isinstance(batch.given, pa.RecordBatch) for row in batch.rows]
        verdict = self._verdict(shard, group, good)
        kills = verdict is Verdict.FAILED
        self._read_ahead(step, [] if kills else good)
        shard.ask(batches, group, kills)
        if group is shard.last and (again := shard.take_waiting()):
            self._do_each(shard, group, again)
        elif group is shard.last:
            shard.checkpoint()  # it is closed once that is committed
            self._passed[shard.part.shard] = shard.part.count
        elif shard.is_due():
            shard.checkpoint()

    def _verdict(self, shard: _Shard, group: _Group, rows: list[int]) -> Verdict:
        """What is to become of a group in which the process died.

        Raises:
            MachineError: nothing says that it is the row and not the machine.
        """
        if not group.alone:
            return Verdict.AGAIN
        verdict = self._deaths.verdict(shard.part.shard, rows, self.tally.answered)
        if verdict is Verdict.LEFT:
            raise MachineError(
                f"the system killed the process twice in row {rows[0]}, with no other row answered in between",
                where={"log": self._run.log(self._number)},
                fix="see dmesg for want of memory; end other programs or set fewer workers, then run the same command "
                "again",
            )
        return verdict

    def _do_each(self, shard: _Shard, group: _Group, others: list[_Group]) -> None:
        """Does groups in the place of one, each read when it is its turn."""
        if group is shard.last:
            shard.last = others[-1]
        for other in others:
            if self._ends():
                break
            self._do(_Step(shard, other, self._reader.submit(shard.read, other, None)))

    def _read_on(self) -> None:
        """Reads ahead where nothing is in hand; a shard whose batch cannot be noted is left."""
        is_tried = False
        while not self._window and (self._coming or not is_tried):
            is_tried = True
            try:
                self._read_ahead(None, [])
            except Exception as error:
                if not self._coming or not _is_left(error):
                    raise
                part = self._coming[0][0].part
                with self._leaving(part):
                    raise

    def _read_ahead(self, step: _Step | None, in_hand: list[int]) -> None:
        """Notes the rows in hand, and starts reading what follows; it is prepared too, unless it has to stand alone."""
        new = self._coming
        last = new[-1][1] if new else self._window[-1].group if self._window else step.group if step else None
        while self._sees_too_little() and not (last and last.alone):
            following = self._next_group()
            if following is None:
                break
            new.append(following)
            last = following[1]
        preparing = self._preparing
        ahead = [(shard, group) for shard, group in (*((s.shard, s.group) for s in self._window), *new) if preparing]
        told = [(shard.part.shard, shard.rows_of(group)) for shard, group in ahead if not group.alone]
        if step is not None or told:
            self._deaths.begin(step.shard.part.shard if step else "", in_hand, told, self.tally.answered)
        while new:
            shard, group = new.popleft()
            read = self._reader.submit(shard.read, group, None if group.alone else preparing)
            self._window.append(_Step(shard, group, read))

    @property
    def _preparing(self) -> Preparing | None:
        return self._stage if isinstance(self._stage, Preparing) else None

    def _sees_too_little(self) -> bool:
        """Whether less is ahead than the stage asks: fewer batches, or rows where those at ends of shards are small."""
        groups = [*(step.group for step in self._window), *(group for _, group in self._coming)]
        wanted = max(self._stage.resources.ahead, 1)
        rows = sum(len(group.positions) for group in groups)
        is_short = rows < wanted * self._settings.batch_rows and len(groups) < MOST_AHEAD * wanted
        return len(groups) < wanted or is_short or rows < self._stage.resources.ahead_rows

    def _next_group(self) -> tuple[_Shard, _Group] | None:
        found = next(self._groups, None)
        if found is None and self._waiting:  # a shard that has to be done again
            self._groups = self._grouped()
            found = next(self._groups, None)
        return found

    def _grouped(self) -> Iterator[tuple[_Shard, _Group]]:
        """The groups of every shard, each shard opened when it is its turn."""
        while self._waiting:
            part = self._waiting.popleft()
            opened: list[_Shard] = []
            with self._leaving(part):
                partitions.heal(self._layout, [part.shard])
                opened.append(_Shard(self, part))
                if not opened[0].groups:
                    self._tally(part)
                    self._passed[part.shard] = part.count
            for shard in opened:
                if shard.groups:
                    self._shards.append(shard)
                for group in shard.groups:
                    if shard not in self._shards:
                        break  # it was left
                    yield shard, group

    def _close_before(self, shard: _Shard, exposed: int) -> None:
        """Closes the shards before one that are committed, and those that a kill could cost too many rows with."""
        for older in self._shards[: self._shards.index(shard)]:
            is_last = self._shards[self._shards.index(older) + 1] is shard
            if not is_last or older.is_committed() or older.exposed + exposed > self._settings.checkpoint_rows:
                with self._leaving(older.part):
                    self._close(older)

    def _close(self, shard: _Shard) -> None:
        """Waits until what a shard's rows got is in the table, and counts it."""
        shard.collect()
        partitions.heal(self._layout, [shard.part.shard])
        self._shards.remove(shard)
        shard.close()
        self._tally(shard.part)
        self._setbacks.end()

    @contextlib.contextmanager
    def _leaving(self, part: Slice) -> Iterator[None]:
        """Leaves a shard of which nothing more can be done now; does it again if a sweep has named the attempt."""
        try:
            yield
        except Swept:
            self._drop(part)
            self._passed.pop(part.shard, None)
            self._waiting.appendleft(part)
        except Exception as error:
            if _is_left(error):
                for shard in [shard for shard in self._shards if shard.part is part]:
                    shard.save()
                self._drop(part)
                self._count_saved(part)
                why, is_over = self._setbacks.add(error)
                self.result.left[part.shard] = str(why)
                self.end(why) if is_over else None
            elif isinstance(error, ConflictError | ShardError):
                self._drop(part)
                self.result.refused[part.shard] = str(error)
            else:
                raise

    def _count_saved(self, part: Slice) -> None:
        """Adds what was committed of a shard that is left, if its table can be read."""
        try:
            partitions.heal(self._layout, [part.shard])
            self._tally(part)
        except Exception as error:
            if not _is_left(error) and not isinstance(error, ShardError | ConflictError | Swept):
                raise

    def _drop(self, part: Slice) -> None:
        self._forget([step for step in self._window if step.shard.part is part])
        self._coming = deque(pair for pair in self._coming if pair[0].part is not part)
        for shard in [shard for shard in self._shards if shard.part is part]:
            self._shards.remove(shard)
            shard.abandon()

    def _forget(self, steps: Iterable[_Step]) -> None:
        """Takes steps out of the window; none of them is being read any more then, nor answered outside."""
        for step in list(steps):
            self._window.remove(step)
            if not step.following.cancel() and step.following.exception() is None:
                for batch in step.following.result():
                    if batch.under_way is not None:
                        batch.under_way.cancel()

    def _tally(self, part: Slice) -> None:
        """Adds what the table says of a shard's rows now to the result."""
        work, runs, statuses = self.look(part)
        previous = work["previous_run"].to_pylist()
        own = [status for now, status in zip(runs, statuses, strict=True) if now == self._run.folder.name]
        changed = sum(now != then for now, then in zip(runs, previous, strict=True))
        self.result.ok += own.count("ok")
        self.result.failed += own.count("failed")
        self.result.dropped += changed - len(own)
        self.result.rows = self.result.ok + self.result.failed + self.result.kept

    def look(self, part: Slice) -> tuple[pa.Table, list[str | None], list[str | None]]:
        """The work set's rows of a shard, with the run and the status that the table has for each of them now.

        Raises:
            ConflictError: the shard was ingested again with other rows.
        """
        work = read_slice(self._run, part)
        names = [f"{self._kind.name}_run", f"{self._kind.name}_status"]
        have, state = partitions.read_partition(self._layout, part.shard, names)
        if state.rows != part.rows:
            raise ConflictError(
                "the shard was ingested again with other rows since this work was planned",
                where={"rows": f"expected {part.rows}, found {state.rows}"},
                fix="run the same command again: it plans the work anew",
            )
        runs, statuses = (have[name].take(work["row"]).to_pylist() for name in names)
        return work, runs, statuses

    def compare(self, batch: pa.RecordBatch, answers: Sequence[tuple[int, Found]]) -> None:
        """On the first batch that allows it: a stage that names a tolerance has to keep it, or nothing is committed."""
        if self.result.difference is None:
            self.result.difference = check_alone(self._stage, batch, answers)

    def keep_notes(self) -> None:
        """Writes what the stage wants to be kept beside its answers to the run's log."""
        take = getattr(self._stage, "take_notes", None)
        if take is not None:
            files.append_lines(self._run.notes(self._number), take())

    def keep_witness(self, row: pa.RecordBatch) -> None:
        self._witness = row

    def is_witness_answered(self, shard: str | None = None) -> bool:
        """Whether the stage answers a row that it has answered before: then it is not the machine that fails others.

        Args:
            shard: of which the row has to be, where a whole shard may be what is not to be had.
        """
        if self._witness is None or shard not in (None, self._witness["shard"][0].as_py()):
            return False
        return any(
            isinstance(found, pa.RecordBatch) for _, found in answer(self._stage, self._witness, tally=self.tally)
        )

    def tell(self, failure: Failure) -> None:
        """Writes where a stage's own code has raised to the run's log, once a place."""
        if failure.trace:
            print(plain_lines(failure.trace.rstrip("\n")), file=sys.stderr, flush=True)

    def count(self, rows: int, failed: int) -> None:
        self._done += rows
        self._failed += failed

    def show(self, in_shard: int) -> None:
        """Says how far the task is: the shards behind it, and rows of the one in hand."""
        self._progress(sum(self._passed.values()) + in_shard, self._failed)

    def too_many_failed(self) -> bool:
        return self._done >= JUDGED_AFTER and self._failed > self._settings.max_failed * self._done


class _Shard:
    """The rows of one shard in one attempt.

    Attributes:
        groups: batch by batch what nobody has answered since the freeze; rows in which the process died stand in
            batches of their own, behind all others.
    """

    def __init__(self, task: _Task, part: Slice) -> None:
        self.part = part
        self._task, self._stage, self._name = task, task._stage, task._kind.name
        self._attempt = f"{task._run.folder.name}-{secrets.token_hex(3)}"
        self._checkpoints = self._seen = 0
        self._work = self._todo()
        self.groups = self._grouped()
        self.last = self.groups[-1] if self.groups else None
        self._waiting: list[_Group] = []  # rows that the machine kept from being answered: tried again at the end
        self._empty = self._unanswered = 0  # batches in a row without an answer, and their rows
        self._pending = _Pending()
        self._edits: EditsTar | None = None
        self._reader: Reader | None = None
        self._committer = ThreadPoolExecutor(1, "committer")
        self._in_flight: _InFlight | None = None

    def _todo(self) -> pa.Table:
        """The rows of the work set that nobody has answered since the freeze, `row` their place in the shard."""
        work, runs, _ = self._task.look(self.part)
        same = [now == then for now, then in zip(runs, work["previous_run"].to_pylist(), strict=True)]
        self._seen = same.count(False)
        return work.filter(pa.array(same, pa.bool_()))

    def _grouped(self) -> list[_Group]:
        size = self._task._settings.batch_rows
        rows = self._work["row"].to_pylist()
        alone = [set(group) for group in self._task._deaths.groups(self.part.shard)]
        special = set().union(*alone) if alone else set()
        normal = [i for i, row in enumerate(rows) if row not in special]
        groups = [_Group(normal[i : i + size]) for i in range(0, len(normal), size)]
        own = [[i for i, row in enumerate(rows) if row in group] for group in alone]
        return groups + [_Group(group, alone=True) for group in own if group]

    def rows_of(self, group: _Group) -> list[int]:
        rows: list[int] = self._work["row"].take(pa.array(group.positions)).to_pylist()
        return rows

    def read(self, group: _Group, preparing: Preparing | None) -> list[Batch]:
        """In the reader: a group as batches with their bytes."""
        if self._reader is None:
            self._reader = Reader(self._task._layout, self.part.shard, self._stage)
        return self._reader.batches(self._work.take(pa.array(group.positions)), self._stage.inputs, preparing)

    def ask(self, batches: list[Batch], group: _Group, kills: bool) -> None:
        """Asks the stage about the batches of one group; `kills`: they are one row in which the process dies.

        Raises:
            TransientError: the machine does not let the rows be answered.
        """
        before, kept = self._task.tally.answered, []
        for batch in batches:
            if isinstance(batch.given, Left):
                answers: Iterable[tuple[int, Found]] = [(0, self._of_unread(batch.given, group))]
            elif isinstance(batch.given, Failure):
                answers = [(0, batch.given)]
            elif kills:
                answers = [(0, Failure("ProcessDied: the process died twice in this row"))]
            else:
                tally = self._task.tally
                answers = list(answer(self._stage, batch.given, ahead=batch.prepared, tally=tally, since=group.since))
                self._task.compare(batch.given, answers)
                if good := [first for first, found in answers if isinstance(found, pa.RecordBatch)]:
                    self._task.keep_witness(batch.given.take(pa.array(good[:1])))
            kept += self._take(batch, answers)
        self._task.keep_notes()
        self._task.show(self._seen)
        if self._task.too_many_failed():
            self._stop_for_failures()
        is_unread = any(isinstance(batch.given, Left) for batch in batches)
        self._keep_waiting(group, kept, is_answered=self._task.tally.answered > before, is_unread=is_unread)

    def _of_unread(self, left: Left, group: _Group) -> Failure | Left:
        """What want of memory for the bytes of a row means for it, as `answer` has it of a stage's."""
        answered = self._task.tally.answered
        if left.why is not None and group.since is not None and answered > group.since:
            return Failure(error_text(left.why))
        return replace(left, since=answered)

    def _take(self, batch: Batch, answers: Iterable[tuple[int, Found]]) -> list[tuple[int, Left]]:
        """Takes answers and failures over; returns the rows that the machine kept from being answered."""
        failed = left = 0
        kept = []
        for first, result in answers:
            if isinstance(result, Left):
                left += 1
                if isinstance(result.why, MachineError):
                    kept.append((batch.rows[first], result))
                else:
                    self._task.end(result.why)
                continue
            if isinstance(result, Failure):
                failed += 1
                self._task.tell(result)
            count = 1 if isinstance(result, Failure) else result.num_rows
            self._pending.rows += batch.rows[first : first + count]
            self._pending.digests += batch.digests[first : first + count]
            self._pending.answers.append(
                result if isinstance(result, Failure) else self._with_edits(result, batch.rows[first:])
            )
        self._seen += len(batch.rows) - left
        self._task.count(len(batch.rows) - left, failed)
        return kept

    def _keep_waiting(self, group: _Group, kept: list[tuple[int, Left]], *, is_answered: bool, is_unread: bool) -> None:
        """Lets rows wait for the end of the shard; leaves it where that helps nothing.

        Raises:
            TransientError: what the machine says.
        """
        if not kept or is_answered:
            self._empty = self._unanswered = 0
        if not kept:
            return
        why = next((left.why for _, left in kept if left.is_final), None)
        if why is not None:
            raise why
        if not is_answered:
            self._empty, self._unanswered = self._empty + 1, self._unanswered + len(kept)
        is_again = group.since is not None
        if is_again or (self._empty >= EMPTY_BATCHES and self._unanswered >= EMPTY_ROWS):
            why = kept[0][1].why
            assert why is not None
            is_of_shard = is_unread or machine.sort_of(why) is Sort.ACCESS
            if not self._task.is_witness_answered(self.part.shard if is_of_shard else None):
                raise why
            self._empty = self._unanswered = 0
        places = {row: i for i, row in enumerate(self._work["row"].to_pylist())}
        self._waiting += [group] if is_again else [_Group([places[row]], since=left.since) for row, left in kept]

    def take_waiting(self) -> list[_Group]:
        """The rows that wait, each alone; those that were kept last are tried last."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def halved(self, group: _Group) -> list[_Group]:
        """A group as two, of which each is read for itself."""
        middle = len(group.positions) // 2
        return [replace(group, positions=part) for part in (group.positions[:middle], group.positions[middle:])]

    def save(self) -> None:
        """Commits what is answered, as far as the machine lets it."""
        for step in (self.collect, self.checkpoint, self.collect):
            with contextlib.suppress(ConflictError, ShardError):
                try:
                    step()
                except Exception as error:
                    if not _is_left(error):
                        raise

    def _with_edits(self, result: pa.RecordBatch, rows: list[int]) -> pa.RecordBatch:
        """Moves generated bytes to the edits tar and puts pointers in their place."""
        if not self._task._generated:
            return result
        columns = dict(zip(result.schema.names, result.columns, strict=True))
        for name in self._task._generated:
            extension = (self._task._kind.outputs.field(name).metadata or {}).get(b"extension", b"bin").decode()
            pointers: list[list[Any]] = [[], [], [], [], []]
            for row, data in zip(rows, columns.pop(name), strict=False):
                place = self._place(row, data.as_py(), extension)
                for column, value in zip(pointers, place, strict=True):
                    column.append(value)
            own = self._task._kind.outputs.names
            for pointer, values in zip(schema.pointer_columns(self._name, name, own), pointers, strict=False):
                columns[pointer.name] = pa.array(values, pointer.type)
        return pa.RecordBatch.from_pydict(columns)

    def _place(self, row: int, data: bytes | None, extension: str) -> tuple[Any, ...]:
        """Where a row's generated bytes lie now, and what they are.

        Args:
            extension: what the stage says they are.
        """
        if data is None:
            return (None, None, None, None, None)
        kind = formats.of_bytes(data) or extension
        if self._edits is None:
            self._edits = EditsTar(self._task._layout, self.part.shard, self._attempt, self._checkpoints)
        pointer = self._edits.add(f"{row:08d}.{kind}", data)
        return pointer.path, pointer.offset, pointer.size, hashlib.sha256(data).hexdigest(), kind

    def is_due(self) -> bool:
        """Whether a checkpoint is."""
        settings = self._task._settings
        age = time.monotonic() - self._pending.since
        early = settings.batch_rows if settings.checkpoint_rows >= EARLY_FROM * settings.batch_rows else 0
        return len(self._pending.rows) + early >= settings.checkpoint_rows or age >= settings.checkpoint_seconds

    @property
    def exposed(self) -> int:
        """Rows that a kill would cost now."""
        return len(self._pending.rows) + (self._in_flight.rows if self._in_flight else 0)

    def is_committed(self) -> bool:
        """Whether nothing is pending, and no commit being made."""
        return not self._pending.rows and (self._in_flight is None or self._in_flight.result.done())

    def make_room(self, rows: int) -> None:
        """Waits for the commit in flight if a kill could cost more than a checkpoint with these rows in hand."""
        if self._in_flight is None:
            return
        if self.exposed + rows > self._task._settings.checkpoint_rows or self._in_flight.result.done():
            self.collect()

    def checkpoint(self, *, failures: bool = True) -> None:
        """Hands the pending rows over to be committed; the commit before is through then."""
        pending, self._pending = self._pending, _Pending()
        if not failures:
            pending = _without_failures(pending)
        if not pending.rows:
            return
        self.collect()
        edits, self._edits = self._edits, None
        self._checkpoints += edits is not None
        self._in_flight = _InFlight(len(pending.rows), self._committer.submit(self._commit, pending, edits))

    def _commit(self, pending: _Pending, edits: EditsTar | None) -> tuple[pa.Table, list[int]]:
        """In the committer: first the edits tar whole and durable, then the rows that point into it."""
        if edits is not None:
            with edits:
                edits.close()
        place = {row: i for i, row in enumerate(self._work["row"].to_pylist())}
        chosen = self._work.take(pa.array([place[row] for row in pending.rows]))
        done = _answers(pending, chosen, self._task._columns, self._task._run.folder.name, self._name)
        committed = commits.commit(
            self._task._layout,
            self.part.shard,
            self._name,
            self._task._columns,
            done,
            chosen["previous_run"].to_pylist(),
            rows=self.part.rows,
            attempt=self._attempt,
        )
        return done, committed.kept

    def collect(self) -> None:
        """Waits for the commit in flight, and raises what it raised."""
        if self._in_flight is not None:
            flight, self._in_flight = self._in_flight, None
            self._keep(*flight.result.result())

    def _keep(self, done: pa.Table, kept: list[int]) -> None:
        """Writes failures that did not replace an answer to the run's log."""
        if not kept:
            return
        self._task.result.kept += len(kept)
        errors = dict(zip(done["row"].to_pylist(), done[f"{self._name}_error"].to_pylist(), strict=True))
        lines = [{"shard": self.part.shard, "row": row, "error": errors[row]} for row in kept]
        files.append_lines(self._task._run.failures(self._task._number), lines)

    def _stop_for_failures(self) -> None:
        errors = [answer.error for answer in self._pending.answers if isinstance(answer, Failure)]
        self.checkpoint(failures=False)
        done, failed, limit = self._task._done, self._task._failed, self._task._settings.max_failed
        raise StageError(
            f"stage '{self._name}' failed on {failed} of {done} rows, more than max_failed = {limit}",
            where={"shard": self.part.shard, "last error": errors[-1] if errors else "see the table"},
            fix="mend the cause and run again (no row of the last checkpoint was marked failed), "
            f"or raise max_failed in [stages.{self._name}.run]",
        )

    def close(self) -> None:
        """Ends a shard of which all is committed."""
        self._committer.shutdown()
        if self._reader is not None:
            self._reader.close()
        if self._edits is not None:
            self._edits.__exit__(None, None, None)
            self._edits = None

    def abandon(self) -> None:
        """Ends a shard of which not all is committed. A commit in flight that fails leaves its rows to be done."""
        self.close()
        if self._in_flight is not None and self._in_flight.result.exception() is None:
            with contextlib.suppress(OSError):  # the log of kept failures: no reason to hide another error
                self.collect()


def _without_failures(pending: _Pending) -> _Pending:
    kept = _Pending()
    at = 0
    for answer_ in pending.answers:
        count = 1 if isinstance(answer_, Failure) else answer_.num_rows
        if not isinstance(answer_, Failure):
            kept.rows += pending.rows[at : at + count]
            kept.digests += pending.digests[at : at + count]
            kept.answers.append(answer_)
        at += count
    return kept


def _answers(pending: _Pending, work: pa.Table, columns: tuple[Column, ...], run: str, stage: str) -> pa.Table:
    """The rows of a commit: the stage's columns and its status columns."""
    parts = []
    own = [column for column in columns if column.name not in {c.name for c in schema.status_columns(stage)}]
    for answer_ in pending.answers:
        if isinstance(answer_, Failure):
            part = {column.name: pa.nulls(1, column.type) for column in own}
            part |= {f"{stage}_status": pa.array(["failed"]), f"{stage}_error": pa.array([answer_.error])}
        else:
            part = {column.name: answer_.column(column.name) for column in own}
            count = answer_.num_rows
            part |= {f"{stage}_status": pa.array(["ok"] * count), f"{stage}_error": pa.nulls(count, pa.string())}
        parts.append(pa.table(part))
    done = pa.concat_tables(parts)
    done = done.append_column(f"{stage}_run", pa.array([run] * len(pending.rows)))
    done = done.append_column(f"{stage}_inputs", work["inputs"])
    done = done.append_column(f"{stage}_sample", work["source_changed"])
    done = done.append_column(f"{stage}_digest", pa.array(pending.digests, pa.uint64()))
    return done.append_column("row", pa.array(pending.rows, pa.int64()))


# --- reading rows ---


class Reader:
    """Makes batches: the rows of a work set with the bytes that the stage needs."""

    def __init__(self, layout: Layout, shard: str, stage: Stage) -> None:
        self._names, self._formats = stage.members, formats_asked(stage)
        self._needs: Callable[[pa.RecordBatch], list[bool]] | None = getattr(stage, "needs_bytes", None)
        self._members = asked_again(lambda: MemberReader(layout, shard, stage.members))

    def batches(self, work: pa.Table, inputs: pa.Schema, preparing: Preparing | None) -> list[Batch]:
        """One batch of rows with their bytes, prepared; each row whose bytes cannot be read as a failure of its own.

        Raises:
            ConflictError: the source was cut.
            ShardError: the source is gone, or another one, at a second opening.
            OSError: no other row of the shard can be read either, or it does not open a second time.
            MemoryError: there is not enough for the bytes of several rows.
        """
        rows = work["row"].to_pylist()
        chosen = work.select(["shard", "row", "uid", *inputs.names, *self._formats]).combine_chunks()
        needed = self._needs(chosen.to_batches()[0]) if self._needs else [True] * len(rows)
        good: list[int] = []
        found: dict[str, list[bytes | None]] = {name: [] for name in self._names}
        failures: list[Batch] = []
        digests: list[int] = []
        unread: dict[int, Exception] = {}
        for i, row in enumerate(rows):
            try:
                data = self._read(row) if needed[i] else [None] * len(self._names)
            except Exception as error:
                if isinstance(error, ConflictError) or not self._members.is_open:
                    raise
                if machine.is_of_the_machine(error):
                    if len(rows) > 1 and machine.is_out_of_memory(error):
                        raise
                    unread[row] = error
                elif isinstance(error, BuilderError):
                    failures.append(Batch([row], Failure(error_text(error)), [NOT_READ]))
                else:
                    raise
                continue
            good.append(i)
            read = dict(zip(self._names, data, strict=True)) if needed[i] else {}
            digests.append(digests_of({name: value for name, value in read.items() if name != EDIT}))
            for name, value in zip(self._names, data, strict=True):
                found[name].append(value)
        is_one_read = any(any(values) for values in found.values())
        failures += self._unread(unread, set(rows), is_one_read=is_one_read)
        if not good:
            return failures
        batch = chosen.take(pa.array(good)).combine_chunks().to_batches()[0]
        for name, values in found.items():
            batch = batch.append_column(name, pa.array(values, pa.large_binary()))
        prepared = None if preparing is None else _prepared(preparing, batch)
        return [Batch([rows[i] for i in good], batch, digests, prepared), *failures]

    def _read(self, row: int) -> list[bytes | None]:
        """The bytes of one row, read after a second opening where a disk or a server did not give them."""
        try:
            return [self._members.read(row, name) for name in self._names]
        except Exception as error:
            if machine.sort_of(error) is not Sort.ACCESS:
                raise
        asked_again(self._members.reopen)
        return [self._members.read(row, name) for name in self._names]

    def _unread(self, unread: dict[int, Exception], rows: set[int], is_one_read: bool) -> list[Batch]:
        """Rows that were not read at two openings: failed, if others of the shard are read.

        Raises:
            Exception: of the first of them, if none is.
        """
        if not unread:
            return []
        sorts = {machine.sort_of(error): error for error in unread.values()}
        if Sort.SHORTAGE in sorts:
            raise sorts[Sort.SHORTAGE]
        if Sort.MEMORY in sorts:  # of one row: those of several were halved
            return [
                Batch([row], Left(machine.told(error), is_final=False), [NOT_READ]) for row, error in unread.items()
            ]
        if not (is_one_read or self._is_another_read(rows)):
            raise next(iter(unread.values()))
        return [Batch([row], Failure(error_text(error)), [NOT_READ]) for row, error in unread.items()]

    def _is_another_read(self, rows: set[int]) -> bool:
        """Whether a row that is none of these can be read."""
        count = self._members.rows()
        others = [row for row in range(0, count, max(count // PROBED, 1)) if row not in rows]
        for row in others:
            try:
                if any(self._read(row)):
                    return True
            except Exception as error:
                if not machine.is_of_the_machine(error) and not isinstance(error, BuilderError):
                    raise
        return False

    def close(self) -> None:
        self._members.__exit__(None, None, None)


def read_once(layout: Layout, shard: str, stage: Stage, work: pa.Table) -> list[Batch]:
    """A batch of rows of a work set, and a failure for each row whose bytes cannot be read."""
    reader = Reader(layout, shard, stage)
    try:
        return reader.batches(work, stage.inputs, None)
    finally:
        reader.close()


def _prepared(stage: Preparing, batch: pa.RecordBatch) -> Future[Any]:
    """What the stage's `prepare` returns or raises, for `answer` to meet."""
    prepared: Future[Any] = Future()
    try:
        prepared.set_result(stage.prepare(batch))
    except Exception as error:
        prepared.set_exception(error)
    return prepared
