"""Asks a stage about a batch: returns answers in order, finds bad rows by halving, compares answers alone and in batch.

Owns what a failed row is. Knows nothing about the table.
"""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa

from builder import machine
from builder.errors import BuilderError, StageError, TransientError
from builder.machine import Sort
from builder.progress import shortened
from builder.stages.contract import Preparing, RowsFailed, Stage, check_result
from builder.stages.finding import place_in
from builder.store.files import ReadError

#: Tries of a batch whose stage raises TransientError, and the pause before the second try, in seconds.
TRANSIENT_TRIES, TRANSIENT_PAUSE_S = 3, 0.5
#: The longest error text in the table; longer ones are cut.
MAX_ERROR = 500
#: What can be a class of errors in `--retry failed:CLASS`.
_KIND = re.compile(r"\w{1,80}")
#: How many rows of a batch are also asked about alone.
TESTED = 3


@dataclass(frozen=True)
class Failure:
    """Why one row has no answer; `trace` is the first traceback from each place in a stage's own code."""

    error: str
    trace: str = field(default="", compare=False)


@dataclass(frozen=True)
class Left:
    """One row that is neither answered nor failed.

    Attributes:
        why: the error that ends the task, or an error of the machine; None if the task was asked to stop.
        since: for an error of the machine, how many rows had been answered when this row last failed.
        is_final: whether asking again now would not help.
    """

    why: BuilderError | None
    since: int = 0
    is_final: bool = True


#: The result for some rows: answers of several, or why one has none.
Found: TypeAlias = pa.RecordBatch | Failure | Left


@dataclass
class Tally:
    """Counts over all rows asked about so far.

    Attributes:
        answered: how many were answered.
        seen: the places in a stage's code whose traceback was reported.
    """

    answered: int = 0
    seen: set[str] = field(default_factory=set)


def answer(
    stage: Stage,
    batch: pa.RecordBatch,
    *,
    ahead: Future[Any] | None = None,
    tally: Tally | None = None,
    since: int | None = None,
) -> Iterator[tuple[int, Found]]:
    """Answers of a batch, with the position of their first row; a batch that raises is halved.

    A row does not fail because of an error of the machine: it is left. But a row that is asked about alone, and runs
    out of memory or gets no answer from a disk or a server again, fails if other rows were answered in between.

    Args:
        ahead: what the stage's `prepare` returned or raised for this batch; without it, `prepare` is called here.
        tally: counts that are continued.
        since: how many rows had been answered when these rows last failed.

    Raises:
        StageError: the stage broke its contract, or says that it cannot go on.
    """
    return _Asking(stage, Tally() if tally is None else tally).ask(batch, 0, ahead, since, TRANSIENT_TRIES)


class _Asking:
    """Asks about one batch, and about parts of it."""

    def __init__(self, stage: Stage, tally: Tally) -> None:
        self._stage, self._tally = stage, tally

    def ask(
        self, batch: pa.RecordBatch, first: int, ahead: Future[Any] | None, since: int | None, tries: int
    ) -> Iterator[tuple[int, Found]]:
        """As `answer`; if a disk or a server does not answer, there are `tries` tries."""
        try:
            result = check_result(type(self._stage), batch, self._patiently(batch, ahead, tries))
        except RowsFailed as partial:
            yield from self._some_failed(batch, first, partial)
            return
        except StageError:
            raise
        except Exception as error:
            why: Failure | Left | None = None
            if batch.num_rows == 1 or _sort_of(error) is Sort.SHORTAGE:
                why = self._of_one(error, since)
        else:
            self._tally.answered += batch.num_rows
            yield first, result
            return
        if why is not None:
            yield from ((first + i, why) for i in range(batch.num_rows))
            return
        now, middle = self._tally.answered, batch.num_rows // 2
        yield from self.ask(batch.slice(0, middle), first, None, now, 1)
        yield from self.ask(batch.slice(middle), first + middle, None, now, 1)

    def _some_failed(self, batch: pa.RecordBatch, first: int, partial: RowsFailed) -> Iterator[tuple[int, Found]]:
        outside = [row for row in {*partial.errors, *partial.left} if not 0 <= row < batch.num_rows]
        if outside:
            raise StageError(
                f"stage '{self._stage.name}' says that row {outside[0]} of a batch of {batch.num_rows} failed",
                fix="raise RowsFailed with positions in the batch, from 0",
            ) from None
        now = self._tally.answered
        alone: dict[int, Failure | Left] = {row: self._of_one(error, None) for row, error in partial.errors.items()}
        alone |= dict.fromkeys(partial.left, Left(partial.why))
        result = check_result(type(self._stage), batch, partial.result)
        self._tally.answered += batch.num_rows - len(alone)
        for place, found in _apart(result, alone):
            if isinstance(found, Left) and not found.is_final:
                yield from self.ask(batch.slice(place, 1), first + place, None, now, 1)
            else:
                yield first + place, found

    def _of_one(self, error: Exception, since: int | None) -> Failure | Left:
        """What an error means for a row that was asked about alone."""
        sort = _sort_of(error)
        if sort is None:
            return self._failed(error)
        if sort is not Sort.SHORTAGE and since is not None and self._tally.answered > since:
            return self._failed(error)
        return Left(machine.explained(error), self._tally.answered, is_final=sort is Sort.SHORTAGE)

    def _failed(self, error: Exception) -> Failure:
        place = place_in(type(self._stage), error)
        if not place or place in self._tally.seen:
            return Failure(error_text(error, place))
        self._tally.seen.add(place)
        return Failure(error_text(error, place), "".join(traceback.format_exception(error)))

    def _patiently(self, batch: pa.RecordBatch, ahead: Future[Any] | None, tries: int) -> pa.RecordBatch:
        attempt = 1
        while True:
            try:
                return self._asked(batch, ahead)
            except (RowsFailed, StageError):
                raise
            except Exception as error:
                is_transient = isinstance(error, TransientError) and attempt < TRANSIENT_TRIES
                if not is_transient and (_sort_of(error) is not Sort.ACCESS or attempt >= tries):
                    raise
            ahead = None
            time.sleep(TRANSIENT_PAUSE_S * attempt)
            attempt += 1

    def _asked(self, batch: pa.RecordBatch, ahead: Future[Any] | None) -> Any:
        if isinstance(self._stage, Preparing):
            prepared = ahead.result() if ahead is not None else self._stage.prepare(batch)
            return self._stage.process(batch, prepared)
        return self._stage.process(batch)


def _apart(result: pa.RecordBatch, others: Mapping[int, Failure | Left]) -> Iterator[tuple[int, Found]]:
    """Splits the answers of a batch: each row without an answer alone, the rows in between together."""
    start = 0
    for row in [*sorted(others), result.num_rows]:
        if row > start:
            yield start, result.slice(start, row - start)
        if row < result.num_rows:
            yield row, others[row]
        start = row + 1


#: The class of a row that failed because of an error of the machine.
_KINDS: dict[Sort | None, str] = {Sort.MEMORY: "OutOfMemory", Sort.ACCESS: "NotAnswered"}


def error_text(error: BaseException, place: str = "") -> str:
    """`class: message` on one line of printable text; the class is the error's `kind`, if it has one that is a word.

    Args:
        place: file and line of a stage's own code, added after the message.
    """
    message = error.what if isinstance(error, BuilderError) else str(error)
    kind = _own_kind(error)
    if kind is None and not isinstance(error, ReadError):
        kind = _KINDS.get(machine.sort_of(error))
    clean = "".join(char if char.isprintable() else " " for char in message[: 10 * MAX_ERROR])
    words = " ".join(clean.split())
    end = f" ({place})" if place else ""
    return f"{kind or type(error).__name__}: {words}"[: MAX_ERROR - len(end)] + end


def _own_kind(error: BaseException) -> str | None:
    """The class that the code raising an error gave it; such an error is never one of the machine."""
    kind = getattr(error, "kind", None)
    return kind if isinstance(kind, str) and _KIND.fullmatch(kind) else None


def _sort_of(error: Exception) -> Sort | None:
    """As `machine.sort_of`; None if the error has its own class."""
    return None if _own_kind(error) else machine.sort_of(error)


# --- alone and in a batch ---


def check_alone(stage: Stage, batch: pa.RecordBatch, answers: Sequence[tuple[int, Found]]) -> float | None:
    """Asks about a few rows of a batch alone, and compares the answers with those that they got in the batch.

    Returns:
        The largest difference: between numbers their difference, infinite between other values that are not the same,
        or the result of the stage's own `difference`; None if there was nothing to compare.

    Raises:
        StageError: the difference is larger than the stage's `tolerance`.
    """
    tolerance = stage.tolerance
    places = [(first + i, answer.slice(i, 1)) for first, answer in _good(answers) for i in range(answer.num_rows)]
    if tolerance is None or batch.num_rows < 2 or not places:
        return None
    largest = 0.0
    for i in range(min(TESTED, len(places))):
        row, within = places[i * (len(places) - 1) // max(min(TESTED, len(places)) - 1, 1)]
        [(_, alone)] = answer(stage, batch.slice(row, 1))
        if isinstance(alone, Left) or (isinstance(alone, Failure) and alone.error.startswith(TransientError.__name__)):
            continue  # nothing to compare
        distance = math.inf if isinstance(alone, Failure) else stage.difference(alone, within)
        if not distance <= tolerance:
            alone_text = alone.error if isinstance(alone, Failure) else _answer_text(alone)
            own = stage.batch_option
            alone_by = f"{own} = 1 in [stages.{stage.name}]" if own else f"batch_rows = 1 in [stages.{stage.name}.run]"
            place = {"shard": batch.column("shard")[row].as_py(), "row": batch.column("row")[row].as_py()}
            raise StageError(
                f"stage '{stage.name}' gives a row another answer alone than in a batch of {batch.num_rows}",
                where={
                    **place, "alone": alone_text, "in the batch": _answer_text(within), "difference": f"{distance:g}",
                    "tolerance": f"{tolerance:g}",
                },
                fix=f"its model lets rows of one batch change each other: use another model, or {alone_by}",
            )  # fmt: skip
        largest = max(largest, distance)
    return largest


def _good(answers: Sequence[tuple[int, Found]]) -> Iterator[tuple[int, pa.RecordBatch]]:
    return ((first, answer) for first, answer in answers if isinstance(answer, pa.RecordBatch))


def _answer_text(answer: pa.RecordBatch) -> str:
    text = str({name: f"{len(v)} bytes" if isinstance(v, bytes) else v for name, v in answer.to_pylist()[0].items()})
    return shortened(text, MAX_ERROR)
