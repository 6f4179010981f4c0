"""Works on the rows of one shard in one attempt: asks the stage, holds answers, commits them."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from builder import formats, machine
from builder.engine.batches import Failure, Found, Left, answer, error_text
from builder.engine.reading import Batch, Reader
from builder.engine.setbacks import is_left
from builder.engine.task_state import TaskState
from builder.engine.workset import Slice
from builder.errors import ConflictError, MachineError, ShardError, StageError
from builder.machine import Sort
from builder.stages.contract import Preparing, outputs_of
from builder.store import files
from builder.table import commits, schema
from builder.table.edits import EditsTar
from builder.table.outputs import Bytes
from builder.table.schema import Column

#: If a checkpoint has at least this many batches, a commit starts one batch early, so that this batch is processed
#: meanwhile. With fewer batches, that would make many more commits, and each would be waited for.
EARLY_FROM = 8
#: After this many batches in a row, with this many rows, without an answer because of the machine, the shard is left,
#: unless a row that was answered before is answered now.
EMPTY_BATCHES, EMPTY_ROWS = 2, 16


@dataclass(frozen=True)
class Group:
    """Positions in a shard's work that form a batch.

    Attributes:
        alone: whether nothing else may be processed at the same time, since the process died in this group.
        since: for a row that could not be answered because of the machine, how many rows had been answered then.
    """

    positions: list[int]
    alone: bool = False
    since: int | None = None


@dataclass(frozen=True)
class _InFlight:
    """A commit that is being made: the number of its rows, and as its result the committed and the kept rows."""

    rows: int
    result: Future[tuple[pa.Table, list[int]]]


@dataclass
class _Pending:
    """Rows that are answered but not committed yet."""

    rows: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    answers: list[pa.RecordBatch | Failure] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class ShardWork:
    """The rows of one shard in one attempt.

    Attributes:
        groups: the rows that no run has answered since the freeze, batch by batch; rows in which the process died are
            in separate batches after all others.
    """

    def __init__(self, state: TaskState, part: Slice, alone: Sequence[Sequence[int]]) -> None:
        """`alone`: groups of rows that become separate batches, since the process died in them."""
        self.part = part
        self._state, self._stage, self._name = state, state.stage, state.kind.name
        self._outputs = outputs_of(state.kind)
        self._alone = alone
        self._attempt = f"{state.run.folder.name}-{secrets.token_hex(3)}"
        self._checkpoints = self._seen = 0
        self._work = self._todo()
        self.groups = self._grouped()
        self.last = self.groups[-1] if self.groups else None
        self._waiting: list[Group] = []  # rows without an answer because of the machine: tried again at the end
        self._empty = self._unanswered = 0  # batches in a row without an answer, and their rows
        self._pending = _Pending()
        self._edits: EditsTar | None = None
        self._reader: Reader | None = None
        self._committer = ThreadPoolExecutor(1, "committer")
        self._in_flight: _InFlight | None = None

    def _todo(self) -> pa.Table:
        """The rows of the work set that no run has answered since the freeze; `row` is the position in the shard."""
        work, runs, _ = self._state.look(self.part)
        same = [now == then for now, then in zip(runs, work["previous_run"].to_pylist(), strict=True)]
        self._seen = same.count(False)
        return work.filter(pa.array(same, pa.bool_()))

    def _grouped(self) -> list[Group]:
        size = self._state.settings.batch_rows
        rows = self._work["row"].to_pylist()
        alone = [set(group) for group in self._alone]
        special = set().union(*alone) if alone else set()
        normal = [i for i, row in enumerate(rows) if row not in special]
        groups = [Group(normal[i : i + size]) for i in range(0, len(normal), size)]
        own = [[i for i, row in enumerate(rows) if row in group] for group in alone]
        return groups + [Group(group, alone=True) for group in own if group]

    def rows_of(self, group: Group) -> list[int]:
        rows: list[int] = self._work["row"].take(pa.array(group.positions)).to_pylist()
        return rows

    def read(self, group: Group, preparing: Preparing | None) -> list[Batch]:
        """In the reader thread: reads a group as batches with their bytes."""
        if self._reader is None:
            self._reader = Reader(self._state.layout, self.part.shard, self._stage)
        return self._reader.batches(self._work.take(pa.array(group.positions)), self._stage.inputs, preparing)

    def ask(self, batches: list[Batch], group: Group, kills: bool) -> None:
        """Asks the stage about the batches of one group; with `kills`, they are one row that kills the process.

        Raises:
            TransientError: the rows cannot be answered because of the machine.
        """
        before, kept = self._state.tally.answered, []
        for batch in batches:
            if isinstance(batch.given, Left):
                answers: Iterable[tuple[int, Found]] = [(0, self._of_unread(batch.given, group))]
            elif isinstance(batch.given, Failure):
                answers = [(0, batch.given)]
            elif kills:
                answers = [(0, Failure("ProcessDied: the process died twice in this row"))]
            else:
                tally = self._state.tally
                answers = list(answer(self._stage, batch.given, ahead=batch.prepared, tally=tally, since=group.since))
                self._state.compare(batch.given, answers)
                if good := [first for first, found in answers if isinstance(found, pa.RecordBatch)]:
                    self._state.keep_witness(batch.given.take(pa.array(good[:1])))
            kept += self._take(batch, answers)
        self._state.keep_notes()
        self._state.show(self._seen)
        if self._state.too_many_failed():
            self._stop_for_failures()
        is_unread = any(isinstance(batch.given, Left) for batch in batches)
        self._keep_waiting(group, kept, is_answered=self._state.tally.answered > before, is_unread=is_unread)

    def _of_unread(self, left: Left, group: Group) -> Failure | Left:
        """What it means for a row that its bytes did not fit in memory; the rule is the same as in `batches.answer`."""
        answered = self._state.tally.answered
        if left.why is not None and group.since is not None and answered > group.since:
            return Failure(error_text(left.why))
        return replace(left, since=answered)

    def _take(self, batch: Batch, answers: Iterable[tuple[int, Found]]) -> list[tuple[int, Left]]:
        """Adds answers and failures to the pending rows; returns rows without an answer because of the machine."""
        failed = left = 0
        kept = []
        for first, result in answers:
            if isinstance(result, Left):
                left += 1
                if isinstance(result.why, MachineError):
                    kept.append((batch.rows[first], result))
                else:
                    self._state.end(result.why)
                continue
            if isinstance(result, Failure):
                failed += 1
                self._state.report(result)
            count = 1 if isinstance(result, Failure) else result.num_rows
            self._pending.rows += batch.rows[first : first + count]
            self._pending.digests += batch.digests[first : first + count]
            self._pending.answers.append(
                result if isinstance(result, Failure) else self._with_edits(result, batch.rows[first:])
            )
        self._seen += len(batch.rows) - left
        self._state.count(len(batch.rows) - left, failed)
        return kept

    def _keep_waiting(self, group: Group, kept: list[tuple[int, Left]], *, is_answered: bool, is_unread: bool) -> None:
        """Lets rows wait until the end of the shard.

        Raises:
            TransientError: the error of the machine, if waiting would not help: the shard is left.
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
            if not self._state.is_witness_answered(self.part.shard if is_of_shard else None):
                raise why
            self._empty = self._unanswered = 0
        places = {row: i for i, row in enumerate(self._work["row"].to_pylist())}
        self._waiting += [group] if is_again else [Group([places[row]], since=left.since) for row, left in kept]

    def take_waiting(self) -> list[Group]:
        """The waiting rows, each in its own group, in the order in which they started to wait."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def halved(self, group: Group) -> list[Group]:
        """A group as two groups, which are read separately."""
        middle = len(group.positions) // 2
        return [replace(group, positions=part) for part in (group.positions[:middle], group.positions[middle:])]

    def save(self) -> None:
        """Commits what is answered, as far as the machine allows it."""
        for step in (self.collect, self.checkpoint, self.collect):
            with contextlib.suppress(ConflictError, ShardError):
                try:
                    step()
                except Exception as error:
                    if not is_left(error):
                        raise

    def _with_edits(self, result: pa.RecordBatch, rows: list[int]) -> pa.RecordBatch:
        """Moves generated bytes to the edits tar and replaces them by pointers."""
        generated = [output for output in self._outputs if isinstance(output, Bytes)]
        if not generated:
            return result
        columns = dict(zip(result.schema.names, result.columns, strict=True))
        for output in generated:
            pointers: list[list[Any]] = [[], [], [], [], []]
            for row, data in zip(rows, columns.pop(output.name), strict=False):
                place = self._place(row, data.as_py(), output.extension)
                for column, value in zip(pointers, place, strict=True):
                    column.append(value)
            own = output.columns(self._name, [one.name for one in self._outputs])
            for pointer, values in zip(own, pointers, strict=False):
                columns[pointer.name] = pa.array(values, pointer.type)
        return pa.RecordBatch.from_pydict(columns)

    def _place(self, row: int, data: bytes | None, extension: str) -> tuple[Any, ...]:
        """Adds a row's generated bytes to the edits tar; returns the values of their columns.

        Args:
            extension: used if the bytes are not a picture of a known format.
        """
        if data is None:
            return (None, None, None, None, None)
        kind = formats.of_bytes(data) or extension
        if self._edits is None:
            self._edits = EditsTar(self._state.layout, self.part.shard, self._attempt, self._checkpoints)
        pointer = self._edits.add(f"{row:08d}.{kind}", data)
        return pointer.path, pointer.offset, pointer.size, hashlib.sha256(data).hexdigest(), kind

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        settings = self._state.settings
        age = time.monotonic() - self._pending.since
        early = settings.batch_rows if settings.checkpoint_rows >= EARLY_FROM * settings.batch_rows else 0
        return len(self._pending.rows) + early >= settings.checkpoint_rows or age >= settings.checkpoint_seconds

    @property
    def exposed(self) -> int:
        """How many answered rows a kill would lose now."""
        return len(self._pending.rows) + (self._in_flight.rows if self._in_flight else 0)

    def is_committed(self) -> bool:
        """Whether no rows are pending and no commit is being made."""
        return not self._pending.rows and (self._in_flight is None or self._in_flight.result.done())

    def make_room(self, rows: int) -> None:
        """Waits for the commit in flight if, with these rows, a kill could lose more than a checkpoint."""
        if self._in_flight is None:
            return
        if self.exposed + rows > self._state.settings.checkpoint_rows or self._in_flight.result.done():
            self.collect()

    def checkpoint(self, *, failures: bool = True) -> None:
        """Starts to commit the pending rows, after the commit before has ended."""
        pending, self._pending = self._pending, _Pending()
        if not failures:
            pending = _without_failures(pending)
        if not pending.rows:
            return
        self.collect()
        edits, self._edits = self._edits, None
        if edits is not None:
            self._checkpoints += 1
        self._in_flight = _InFlight(len(pending.rows), self._committer.submit(self._commit, pending, edits))

    def _commit(self, pending: _Pending, edits: EditsTar | None) -> tuple[pa.Table, list[int]]:
        """In the committer thread: makes the edits tar durable, then commits the rows that point into it."""
        if edits is not None:
            with edits:
                edits.close()
        place = {row: i for i, row in enumerate(self._work["row"].to_pylist())}
        chosen = self._work.take(pa.array([place[row] for row in pending.rows]))
        done = _answers(pending, chosen, self._state.columns, self._state.run.folder.name, self._name)
        committed = commits.commit(
            self._state.layout,
            self.part.shard,
            self._name,
            self._state.columns,
            done,
            chosen["previous_run"].to_pylist(),
            rows=self.part.rows,
            attempt=self._attempt,
        )
        return done, committed.kept

    def collect(self) -> None:
        """Waits for the commit in flight, and raises its error if it failed."""
        if self._in_flight is not None:
            flight, self._in_flight = self._in_flight, None
            self._keep(*flight.result.result())

    def _keep(self, done: pa.Table, kept: list[int]) -> None:
        """Writes failures that did not replace an answer to the run's log."""
        if not kept:
            return
        self._state.result.kept += len(kept)
        errors = dict(zip(done["row"].to_pylist(), done[f"{self._name}_error"].to_pylist(), strict=True))
        lines = [{"shard": self.part.shard, "row": row, "error": errors[row]} for row in kept]
        files.append_lines(self._state.run.failures(self._state.number), lines)

    def _stop_for_failures(self) -> None:
        errors = [answer.error for answer in self._pending.answers if isinstance(answer, Failure)]
        self.checkpoint(failures=False)
        done, failed, limit = self._state.done, self._state.failed, self._state.settings.max_failed
        raise StageError(
            f"stage '{self._name}' failed on {failed} of {done} rows, more than max_failed = {limit}",
            where={"shard": self.part.shard, "last error": errors[-1] if errors else "see the table"},
            fix="fix the cause of the last error and run again (no row of the last checkpoint was marked failed), "
            f"or raise max_failed in [stages.{self._name}.run]",
        )

    def close(self) -> None:
        """Ends a shard whose rows are all committed."""
        self._committer.shutdown()
        if self._reader is not None:
            self._reader.close()
        if self._edits is not None:
            self._edits.__exit__(None, None, None)
            self._edits = None

    def abandon(self) -> None:
        """Ends a shard with rows that are not committed. If the commit in flight fails, its rows stay to be done."""
        self.close()
        if self._in_flight is not None and self._in_flight.result.exception() is None:
            with contextlib.suppress(OSError):  # an error in the log of kept failures must not hide another error
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
