"""One task: reads rows ahead, asks the stage, commits checkpoints.

A task is a run directory and a number; it keeps one stage instance for all its shards. Three threads work at once:

    reader      reads the bytes of groups 4, 5, 6 ... and lets the stage prepare them    Task._window
    main        asks the stage about group 3                                            Task._do
    committer   makes the checkpoint of groups 1 and 2 durable and commits it            ShardWork._in_flight

The window may reach into the next shard while the one before is still being committed. A kill loses the rows in the
committer and the main thread, at most `checkpoint_rows`; the rows in the reader have no answers yet.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from builder import machine
from builder.engine.in_hand import InHand, Verdict
from builder.engine.reading import Batch
from builder.engine.setbacks import Setbacks, is_left
from builder.engine.shard import Group, ShardWork
from builder.engine.task_state import Progress, Result, TaskSettings, TaskState
from builder.engine.workset import Slice, read_task
from builder.errors import ConflictError, MachineError, ShardError
from builder.stages.contract import Preparing, Stage, gives_up
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import partitions
from builder.table.commits import Swept

#: How many small batches are read ahead in place of one of full size.
MOST_AHEAD = 8
#: Seconds between two checks whether the run was stopped, for a stage that waits for something outside.
STOP_EVERY_S = 0.1


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
    """Does one task of a stage's run to its end, or until `stopping` returns True; commits what is done either way.

    Raises:
        StageError: the stage cannot start or go on, broke its contract, or more than `max_failed` of the rows failed.
        TransientError: several shards in a row failed because of a full disk, too little memory or the like.
    """
    started = time.monotonic()
    task = Task(layout, run, number, stage, settings, progress, stopping)
    with _giving_up(stage, stopping):
        stage.setup(device)
    try:
        with _giving_up(stage, stopping):
            task.run()
        task.state.result.totals = stage.totals()
    finally:
        stage.close()
        with contextlib.suppress(OSError):  # no longer needed; must not hide another error
            files.remove(run.in_hand(number))
    task.state.result.stopped = stopping()
    task.state.result.seconds = time.monotonic() - started
    return task.state.result


@contextlib.contextmanager
def _giving_up(stage: Stage, stopping: Callable[[], bool]) -> Iterator[None]:
    """Inside, calls `give_up` of a stage that waits for something outside when the run is stopped."""
    if not gives_up(stage):
        yield
        return
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(STOP_EVERY_S):
            if stopping():
                stage.give_up()

    watcher = threading.Thread(target=watch, name="stopping")
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


@dataclass(frozen=True)
class _Step:
    """A group of rows of one shard, and what is being read for it."""

    shard: ShardWork
    group: Group
    following: Future[list[Batch]]


class Task:
    """Processes the groups of a task, shard after shard; the next groups are read and prepared ahead."""

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
        self.state = TaskState(layout, run, number, stage, settings, progress)
        self._layout, self._run, self._number, self._stage = layout, run, number, stage
        self._settings, self._stopping = settings, stopping
        self._in_hand = InHand(run.in_hand(number))
        self._setbacks = Setbacks()
        parts = read_task(run, number)
        self._waiting = deque(sorted(parts, key=lambda part: self._in_hand.is_last(part.shard)))
        self._groups = self._grouped()
        self._window: deque[_Step] = deque()
        self._coming: deque[tuple[ShardWork, Group]] = deque()  # groups after the window, not yet recorded as in hand
        self._shards: list[ShardWork] = []  # the open shards, in order
        self._reader = ThreadPoolExecutor(1, "reader")

    def run(self) -> None:
        """Asks the stage about every row that is left, and commits checkpoints."""
        with self._reader:
            try:
                while self._waiting and not self._ends():  # again if a shard was swept at its last commit
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
        for why in self.state.ended:
            raise why

    def _ends(self) -> bool:
        return bool(self.state.ended) or self._stopping()

    def _take_over(self) -> None:
        """If a task ends early: takes what a stage that waits for something outside already got for batches ahead."""
        if not gives_up(self._stage) or not self._ends():
            return
        self._stage.give_up()
        while self._window:
            step = self._window.popleft()
            with self._leaving(step.shard.part):
                step.shard.ask(
                    [batch for batch in step.following.result() if batch.under_way is not None], step.group, kills=False
                )

    def _do(self, step: _Step) -> None:
        """Asks the stage about one group, while the next ones are read."""
        shard, group = step.shard, step.group
        try:
            batches = step.following.result()
        except Exception as error:
            if not machine.is_out_of_memory(error) or len(group.positions) == 1:
                raise
            self._do_each(shard, group, shard.halved(group))
            return
        if group.alone:
            shard.checkpoint()  # so that no answer is lost if the process dies here again
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
            shard.checkpoint()  # the shard is closed when this is committed
            self.state.passed[shard.part.shard] = shard.part.count
        elif shard.is_due():
            shard.checkpoint()

    def _verdict(self, shard: ShardWork, group: Group, rows: list[int]) -> Verdict:
        """What to do with a group in which the process died.

        Raises:
            MachineError: the machine, not the row, may be the cause.
        """
        if not group.alone:
            return Verdict.AGAIN
        verdict = self._in_hand.verdict(shard.part.shard, rows, self.state.tally.answered)
        if verdict is Verdict.LEFT:
            raise MachineError(
                f"the system killed the process twice in row {rows[0]}, with no other row answered in between",
                where={"log": self._run.log(self._number)},
                fix="see dmesg for lack of memory; end other programs or set fewer workers, then run the same command "
                "again",
            )
        return verdict

    def _do_each(self, shard: ShardWork, group: Group, others: list[Group]) -> None:
        """Does other groups in place of one, reading each when it is its turn."""
        if group is shard.last:
            shard.last = others[-1]
        for other in others:
            if self._ends():
                break
            self._do(_Step(shard, other, self._reader.submit(shard.read, other, None)))

    def _read_on(self) -> None:
        """Reads ahead while no group is being processed; leaves a shard whose batch cannot be recorded as in hand."""
        is_tried = False
        while not self._window and (self._coming or not is_tried):
            is_tried = True
            try:
                self._read_ahead(None, [])
            except Exception as error:
                if not self._coming or not is_left(error):
                    raise
                part = self._coming[0][0].part
                with self._leaving(part):
                    raise

    def _read_ahead(self, step: _Step | None, in_hand: list[int]) -> None:
        """Records the rows in hand, then starts to read the next groups, and to prepare those that need not run alone.

        The record is written before anything is prepared: if preparing kills the process, the next process has to know
        which rows may have been the cause. For the same reason nothing is read after a group that runs alone: if the
        process dies again, no other row can be the cause.
        """
        new = self._coming
        last = self._last_group(step)
        while self._sees_too_little() and not (last and last.alone):
            following = self._next_group()
            if following is None:
                break
            new.append(following)
            last = following[1]
        preparing = self._preparing
        prepared: list[tuple[str, list[int]]] = []
        if preparing is not None:
            ahead = [*((one.shard, one.group) for one in self._window), *new]
            prepared = [(shard.part.shard, shard.rows_of(group)) for shard, group in ahead if not group.alone]
        if step is not None or prepared:
            self._in_hand.begin(step.shard.part.shard if step else "", in_hand, prepared, self.state.tally.answered)
        while new:
            shard, group = new.popleft()
            read = self._reader.submit(shard.read, group, None if group.alone else preparing)
            self._window.append(_Step(shard, group, read))

    def _last_group(self, step: _Step | None) -> Group | None:
        """The group after which reading goes on: the last one that is coming, being read, or in hand."""
        if self._coming:
            return self._coming[-1][1]
        if self._window:
            return self._window[-1].group
        return None if step is None else step.group

    @property
    def _preparing(self) -> Preparing | None:
        return self._stage if isinstance(self._stage, Preparing) else None

    def _sees_too_little(self) -> bool:
        """Whether the stage asks for more to be read ahead: more batches, or more rows if the batches are small."""
        groups = [*(step.group for step in self._window), *(group for _, group in self._coming)]
        wanted = max(self._stage.resources.ahead, 1)
        rows = sum(len(group.positions) for group in groups)
        is_short = rows < wanted * self._settings.batch_rows and len(groups) < MOST_AHEAD * wanted
        return len(groups) < wanted or is_short or rows < self._stage.resources.ahead_rows

    def _next_group(self) -> tuple[ShardWork, Group] | None:
        found = next(self._groups, None)
        if found is None and self._waiting:  # a shard that has to be done again
            self._groups = self._grouped()
            found = next(self._groups, None)
        return found

    def _grouped(self) -> Iterator[tuple[ShardWork, Group]]:
        """The groups of every shard; each shard is opened when it is its turn."""
        while self._waiting:
            part = self._waiting.popleft()
            opened: list[ShardWork] = []
            with self._leaving(part):
                partitions.heal(self._layout, [part.shard])
                opened.append(ShardWork(self.state, part, self._in_hand.groups(part.shard)))
                if not opened[0].groups:
                    self.state.add_shard(part)
                    self.state.passed[part.shard] = part.count
            for shard in opened:
                if shard.groups:
                    self._shards.append(shard)
                for group in shard.groups:
                    if shard not in self._shards:
                        break  # it was left
                    yield shard, group

    def _close_before(self, shard: ShardWork, exposed: int) -> None:
        """Closes earlier shards that are committed, and those with which a kill could lose too many rows.

        The shard right before may stay open while its last commit is made, so that the stage does not wait for the
        disk. But its rows and those of this shard together must not exceed a checkpoint.
        """
        for older in self._shards[: self._shards.index(shard)]:
            is_last = self._shards[self._shards.index(older) + 1] is shard
            if not is_last or older.is_committed() or older.exposed + exposed > self._settings.checkpoint_rows:
                with self._leaving(older.part):
                    self._close(older)

    def _close(self, shard: ShardWork) -> None:
        """Waits until the answers of a shard are in the table, and counts them."""
        shard.collect()
        partitions.heal(self._layout, [shard.part.shard])
        self._shards.remove(shard)
        shard.close()
        self.state.add_shard(shard.part)
        self._setbacks.end()

    @contextlib.contextmanager
    def _leaving(self, part: Slice) -> Iterator[None]:
        """Leaves or refuses a shard that raises an error inside; does it again if a sweep has recorded the attempt."""
        try:
            yield
        except Swept:
            self._drop(part)
            self.state.passed.pop(part.shard, None)
            self._waiting.appendleft(part)
        except Exception as error:
            if is_left(error):
                for shard in [shard for shard in self._shards if shard.part is part]:
                    shard.save()
                self._drop(part)
                self._count_saved(part)
                why, is_over = self._setbacks.add(error)
                self.state.result.left[part.shard] = str(why)
                if is_over:
                    self.state.end(why)
            elif isinstance(error, ConflictError | ShardError):
                self._drop(part)
                self.state.result.refused[part.shard] = str(error)
            else:
                raise

    def _count_saved(self, part: Slice) -> None:
        """Counts the committed rows of a shard that is left, if its part of the table can be read."""
        try:
            partitions.heal(self._layout, [part.shard])
            self.state.add_shard(part)
        except Exception as error:
            if not is_left(error) and not isinstance(error, ShardError | ConflictError | Swept):
                raise

    def _drop(self, part: Slice) -> None:
        self._forget([step for step in self._window if step.shard.part is part])
        self._coming = deque(pair for pair in self._coming if pair[0].part is not part)
        for shard in [shard for shard in self._shards if shard.part is part]:
            self._shards.remove(shard)
            shard.abandon()

    def _forget(self, steps: Iterable[_Step]) -> None:
        """Removes steps from the window; waits until they are not being read, and cancels work on them outside."""
        for step in list(steps):
            self._window.remove(step)
            if not step.following.cancel() and step.following.exception() is None:
                for batch in step.following.result():
                    if batch.under_way is not None:
                        batch.under_way.cancel()
