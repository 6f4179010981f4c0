"""Asking a stage about a batch: answers in order, bad rows found by halving, and whether a batch changes an answer.

Owns what a failed row is. Knows no table.
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
from builder.stages.contract import Preparing, RowsFailed, Stage, check_result
from builder.stages.finding import place_in
from builder.store.files import ReadError

#: Tries of a row whose stage raises TransientError, and the pause before the second, in seconds.
TRANSIENT_TRIES, TRANSIENT_PAUSE_S = 3, 0.5
#: An error text in the table is cut at this length.
MAX_ERROR = 500
#: What can be a class of errors, as `--retry failed:CLASS` takes it.
_KIND = re.compile(r"\w{1,80}")
#: Rows of a batch that are asked about alone, too.
TESTED = 3


@dataclass(frozen=True)
class Failure:
    """Why one row has no answer; `trace` is the traceback of a stage's own code, where it is the first of its kind."""

    error: str
    trace: str = field(default="", compare=False)


@dataclass(frozen=True)
class Left:
    """One row that stays as it is.

    Attributes:
        why: what ends the task, or what of the machine's was in the way; None where it was asked to stop.
        since: of the machine's, how many rows had been answered when this one last failed.
        is_final: whether asking again helps nothing now.
    """

    why: BuilderError | None
    since: int = 0
    is_final: bool = True


#: What is found out about rows: answers of several, or that one has none.
Found: TypeAlias = pa.RecordBatch | Failure | Left


@dataclass
class Tally:
    """What is known of the rows asked about so far.

    Attributes:
        answered: how many were answered.
        seen: the places in a stage's code whose tracebacks were told.
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

    What is the machine's makes no row fail: the row is left. One that stood alone has failed all the same if other rows
    were answered since it failed before, by want of memory or of an answer of a disk or a server.

    Args:
        ahead: what the stage's `prepare` returned or raised for this batch; without it, `prepare` is called here.
        tally: counted on.
        since: how many rows had been answered when these failed before.

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
        """As `answer`; a disk or a server that does not answer is asked so many times."""
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
                fix="RowsFailed takes positions in the batch, from 0",
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
        """What an error means for a row; of the machine's, for one that stood alone."""
        sort = _sort_of(error)
        if sort is None:
            return self._failed(error)
        if sort is not Sort.SHORTAGE and since is not None and self._tally.answered > since:
            return self._failed(error)
        return Left(machine.told(error), self._tally.answered, is_final=sort is Sort.SHORTAGE)

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
    """The answers of a batch some of whose rows have none: each of these alone, the rows between them together."""
    start = 0
    for row in [*sorted(others), result.num_rows]:
        if row > start:
            yield start, result.slice(start, row - start)
        if row < result.num_rows:
            yield row, others[row]
        start = row + 1


#: Our words for what is the machine's, where a row has failed by it.
_KINDS: dict[Sort | None, str] = {Sort.MEMORY: "OutOfMemory", Sort.ACCESS: "NotAnswered"}


def error_text(error: BaseException, place: str = "") -> str:
    """`class: message` on one line of printable text; the class is its `kind`, if it has one that is a word.

    Args:
        place: file and line of a stage's own code, put behind the message.
    """
    message = error.what if isinstance(error, BuilderError) else str(error)
    kind = _own_kind(error)
    if kind is None and not isinstance(error, ReadError):
        kind = _KINDS.get(machine.sort_of(error))
    clean = "".join(char if char.isprintable() else " " for char in message[: 10 * MAX_ERROR])
    words = " ".join(clean.split())
    behind = f" ({place})" if place else ""
    return f"{kind or type(error).__name__}: {words}"[: MAX_ERROR - len(behind)] + behind


def _own_kind(error: BaseException) -> str | None:
    """The class that an error's owner gave it: what it is, is decided."""
    kind = getattr(error, "kind", None)
    return kind if isinstance(kind, str) and _KIND.fullmatch(kind) else None


def _sort_of(error: Exception) -> Sort | None:
    """As `machine.sort_of`; None where the error's owner gave it a class."""
    return None if _own_kind(error) else machine.sort_of(error)


# --- alone and in a batch ---


def check_alone(stage: Stage, batch: pa.RecordBatch, answers: Sequence[tuple[int, Found]]) -> float | None:
    """Asks about a few rows of a batch alone, and compares that with the answers that they got beside the others.

    Returns:
        The largest difference: of numbers as they are, infinite between values that are no numbers and not the same,
        or what the stage's own `difference` says; None where there was nothing to compare.

    Raises:
        StageError: it is larger than the stage's `tolerance`.
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
            continue  # that says nothing of the answers
        found = math.inf if isinstance(alone, Failure) else stage.difference(alone, within)
        if not found <= tolerance:
            said = alone.error if isinstance(alone, Failure) else _shown(alone)
            own = stage.batch_option
            alone_by = f"{own} = 1 in [stages.{stage.name}]" if own else f"batch_rows = 1 in [stages.{stage.name}.run]"
            place = {"shard": batch.column("shard")[row].as_py(), "row": batch.column("row")[row].as_py()}
            raise StageError(
                f"stage '{stage.name}' gives a row another answer alone than in a batch of {batch.num_rows}",
                where={
                    **place, "alone": said, "in the batch": _shown(within), "difference": f"{found:g}",
                    "tolerance": f"{tolerance:g}",
                },
                fix=f"its model lets rows of one batch change each other: use another model, or {alone_by}",
            )  # fmt: skip
        largest = max(largest, found)
    return largest


def _good(answers: Sequence[tuple[int, Found]]) -> Iterator[tuple[int, pa.RecordBatch]]:
    return ((first, answer) for first, answer in answers if isinstance(answer, pa.RecordBatch))


def _shown(answer: pa.RecordBatch) -> str:
    text = str({name: f"{len(v)} bytes" if isinstance(v, bytes) else v for name, v in answer.to_pylist()[0].items()})
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."
