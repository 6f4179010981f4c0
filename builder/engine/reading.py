"""Reads the batches of a work set with the bytes that a stage needs, and prepares them ahead."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from builder import machine
from builder.engine.batches import Failure, Left, error_text
from builder.errors import BuilderError, ConflictError
from builder.machine import Sort, asked_again
from builder.sources.members import EDIT, NOT_READ, digests_of
from builder.sources.reader import MemberReader
from builder.stages.contract import Preparing, Stage, UnderWay, formats_asked
from builder.store.layout import Layout

#: How many other rows of a shard are tried if no row of a batch can be read.
PROBED = 16


@dataclass(frozen=True)
class Batch:
    """Rows with what the stage is given, prepared ahead if possible; or one row whose bytes could not be read.

    Attributes:
        digests: the value of `<stage>_digest` for each row.
        prepared: the result of the stage's `prepare`, or the error that it raised.
    """

    rows: list[int]
    given: pa.RecordBatch | Failure | Left
    digests: list[int]
    prepared: Future[Any] | None = None

    @property
    def under_way(self) -> UnderWay | None:
        """The prepared object, if work on it goes on outside, so that it can be cancelled; else None."""
        prepared = None if self.prepared is None or self.prepared.exception() else self.prepared.result()
        return prepared if isinstance(prepared, UnderWay) else None


# --- reading rows ---


class Reader:
    """Makes batches: the rows of a work set with the bytes that the stage needs."""

    def __init__(self, layout: Layout, shard: str, stage: Stage) -> None:
        self._stage, self._names, self._formats = stage, stage.members, formats_asked(stage)
        self._members = asked_again(lambda: MemberReader(layout, shard, stage.members))

    def batches(self, work: pa.Table, inputs: pa.Schema, preparing: Preparing | None) -> list[Batch]:
        """One batch of rows with their bytes, prepared, and a failure for each row whose bytes cannot be read.

        Raises:
            ConflictError: the source was cut.
            ShardError: when opened a second time, the source is gone or is another one.
            OSError: no other row of the shard can be read either, or the source cannot be opened a second time.
            MemoryError: there is too little memory for the bytes of several rows.
        """
        rows = work["row"].to_pylist()
        chosen = work.select(["shard", "row", "uid", *inputs.names, *self._formats]).combine_chunks()
        needed = self._stage.needs_bytes(chosen.to_batches()[0])
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
        """The bytes of one row; opens the files a second time if a disk or a server did not return them."""
        try:
            return [self._members.read(row, name) for name in self._names]
        except Exception as error:
            if machine.sort_of(error) is not Sort.ACCESS:
                raise
        asked_again(self._members.reopen)
        return [self._members.read(row, name) for name in self._names]

    def _unread(self, unread: dict[int, Exception], rows: set[int], is_one_read: bool) -> list[Batch]:
        """The batches of rows that could not be read in two tries: they fail, if another row of the shard can be read.

        Raises:
            Exception: the error of the first of them, if no row can be read.
        """
        if not unread:
            return []
        sorts = {machine.sort_of(error): error for error in unread.values()}
        if Sort.SHORTAGE in sorts:
            raise sorts[Sort.SHORTAGE]
        if Sort.MEMORY in sorts:  # this is one row: batches of several were halved
            left = {row: Left(machine.explained(error), is_final=False) for row, error in unread.items()}
            return [Batch([row], why, [NOT_READ]) for row, why in left.items()]
        if not (is_one_read or self._is_another_read(rows)):
            raise next(iter(unread.values()))
        return [Batch([row], Failure(error_text(error)), [NOT_READ]) for row, error in unread.items()]

    def _is_another_read(self, rows: set[int]) -> bool:
        """Whether a row other than these can be read."""
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
    """The result of the stage's `prepare`, or its error, which `answer` will raise."""
    prepared: Future[Any] = Future()
    try:
        prepared.set_result(stage.prepare(batch))
    except Exception as error:
        prepared.set_exception(error)
    return prepared
