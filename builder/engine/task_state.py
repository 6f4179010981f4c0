"""The state of a task: rows done and failed, a row that was answered, why the task cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from builder.engine.batches import Failure, Found, Tally, answer, check_alone
from builder.engine.workset import Slice, read_slice
from builder.errors import BuilderError, ConflictError
from builder.progress import plain_lines
from builder.stages.contract import Stage, columns_of
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import partitions

#: Rows of a task after which the share of failures is checked.
JUDGED_AFTER = 100

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskSettings:
    """The settings of execution in `run.json`."""

    checkpoint_rows: int
    checkpoint_seconds: float
    max_failed: float
    batch_rows: int


@dataclass
class Result:
    """The result of a task, read from the table: rows done by an earlier process or a copy of the task count too.

    Attributes:
        rows: rows that were tried: ok, failed and kept.
        ok: rows that this run has answered.
        failed: rows that the table has as failed.
        kept: rows that failed but keep an older answer.
        dropped: rows that another run answered meanwhile.
        refused: shards that were ingested again meanwhile, or whose source is gone or changed, with the reason.
        left: shards that failed because of the machine, with the reason: the same command does the rest of them.
        stopped: whether it was asked to stop before its end.
        difference: the largest one between an answer alone and in a batch; None for a stage without a tolerance.
        totals: the stage's own counts.
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


class TaskState:
    """The state of a task: rows done and failed, a row that was answered, why the task cannot go on.

    Attributes:
        result: the result so far.
        tally: counts of `batches.answer`.
        ended: why the task cannot go on.
        passed: rows of the shards that are done, by shard.
    """

    def __init__(
        self,
        layout: Layout,
        run: RunFiles,
        number: int,
        stage: Stage,
        settings: TaskSettings,
        progress: Progress,
    ) -> None:
        self.layout, self.run, self.number, self.stage, self.settings = layout, run, number, stage, settings
        self.kind = type(stage)
        self.columns = columns_of(self.kind)
        self.result = Result()
        self.tally = Tally()
        self.ended: list[BuilderError] = []
        self.passed: dict[str, int] = {}
        self.done = self.failed = 0
        self._progress = progress
        self._witness: pa.RecordBatch | None = None  # the last row that was answered, with its inputs

    def end(self, why: BuilderError | None) -> None:
        """Ends the task; what is answered is kept, and the error is raised if one is given."""
        if why is not None and not self.ended:
            self.ended.append(why)

    def look(self, part: Slice) -> tuple[pa.Table, list[str | None], list[str | None]]:
        """The work set's rows of a shard, with the current run and status of each row in the table.

        Raises:
            ConflictError: the shard was ingested again with other rows.
        """
        work = read_slice(self.run, part)
        names = [f"{self.kind.name}_run", f"{self.kind.name}_status"]
        have, state = partitions.read_partition(self.layout, part.shard, names)
        if state.rows != part.rows:
            raise ConflictError(
                "the shard was ingested again with other rows since this work was planned",
                where={"rows": f"expected {part.rows}, found {state.rows}"},
                fix="run the same command again: it plans the work again",
            )
        runs, statuses = (have[name].take(work["row"]).to_pylist() for name in names)
        return work, runs, statuses

    def add_shard(self, part: Slice) -> None:
        """Adds the current state of a shard's rows in the table to the result."""
        work, runs, statuses = self.look(part)
        previous = work["previous_run"].to_pylist()
        own = [status for now, status in zip(runs, statuses, strict=True) if now == self.run.folder.name]
        changed = sum(now != then for now, then in zip(runs, previous, strict=True))
        self.result.ok += own.count("ok")
        self.result.failed += own.count("failed")
        self.result.dropped += changed - len(own)
        self.result.rows = self.result.ok + self.result.failed + self.result.kept

    def count(self, rows: int, failed: int) -> None:
        self.done += rows
        self.failed += failed

    def show(self, in_shard: int) -> None:
        """Reports progress: the rows of the shards that are done, and of the current one."""
        self._progress(sum(self.passed.values()) + in_shard, self.failed)

    def too_many_failed(self) -> bool:
        return self.done >= JUDGED_AFTER and self.failed > self.settings.max_failed * self.done

    def compare(self, batch: pa.RecordBatch, answers: Sequence[tuple[int, Found]]) -> None:
        """Checks the tolerance of a stage on the first batch that allows it; raises StageError before any commit."""
        if self.result.difference is None:
            self.result.difference = check_alone(self.stage, batch, answers)

    def keep_notes(self) -> None:
        """Writes the notes that the stage keeps next to its answers to the run's log."""
        if notes := self.stage.take_notes():
            files.append_lines(self.run.notes(self.number), notes)

    def keep_witness(self, row: pa.RecordBatch) -> None:
        self._witness = row

    def is_witness_answered(self, shard: str | None = None) -> bool:
        """Whether the stage still answers a row that it answered before: then the machine is not why others fail.

        Args:
            shard: the row has to be of this shard, if the whole shard may be unreadable.
        """
        if self._witness is None or shard not in (None, self._witness["shard"][0].as_py()):
            return False
        return any(
            isinstance(found, pa.RecordBatch) for _, found in answer(self.stage, self._witness, tally=self.tally)
        )

    def report(self, failure: Failure) -> None:
        """Writes a traceback from the stage's own code to the run's log, once per place."""
        if failure.trace:
            print(plain_lines(failure.trace.rstrip("\n")), file=sys.stderr, flush=True)
