"""Asking a stage about a batch: answers in order, bad rows found by halving, and whether a batch changes an answer.

Owns what a failed row is. Knows no table.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from builder.errors import BuilderError, StageError, TransientError
from builder.stage import Preparing, RowsFailed, Stage, check_result

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
    """Why one row has no answer."""

    error: str


@dataclass(frozen=True)
class Left:
    """One row that stays as it is, since the task ends; `why` is None where it was asked to."""

    why: StageError | None


#: What is found out about rows: answers of several, or that one has none.
Found: TypeAlias = pa.RecordBatch | Failure | Left


def answer(
    stage: Stage, batch: pa.RecordBatch, first: int = 0, *, ahead: Future[Any] | None = None
) -> Iterator[tuple[int, Found]]:
    """Answers of a batch in order, with the position of their first row; a batch that raises is halved.

    Args:
        ahead: what the stage's `prepare` returned or raised for this batch; without it, `prepare` is called here.

    Raises:
        StageError: the stage broke its contract, or says that it cannot go on.
    """
    try:
        result = _patiently(stage, batch, ahead)
    except RowsFailed as partial:
        outside = [row for row in {*partial.errors, *partial.left} if not 0 <= row < batch.num_rows]
        if outside:
            raise StageError(
                f"stage '{stage.name}' says that row {outside[0]} of a batch of {batch.num_rows} failed",
                fix="RowsFailed takes positions in the batch, from 0",
            ) from None
        alone: dict[int, Failure | Left] = {row: Failure(error_text(error)) for row, error in partial.errors.items()}
        alone |= dict.fromkeys(partial.left, Left(partial.why))
        yield from _apart(check_result(type(stage), batch, partial.result), alone, first)
        return
    except StageError:
        raise
    except Exception as error:
        if batch.num_rows == 1:
            yield first, Failure(error_text(error))
            return
        middle = batch.num_rows // 2
        yield from answer(stage, batch.slice(0, middle), first)
        yield from answer(stage, batch.slice(middle), first + middle)
        return
    yield first, check_result(type(stage), batch, result)


def _apart(result: pa.RecordBatch, others: Mapping[int, Failure | Left], first: int) -> Iterator[tuple[int, Found]]:
    """The answers of a batch some of whose rows have none: each of these alone, the rows between them together."""
    start = 0
    for row in [*sorted(others), result.num_rows]:
        if row > start:
            yield first + start, result.slice(start, row - start)
        if row < result.num_rows:
            yield first + row, others[row]
        start = row + 1


def _patiently(stage: Stage, batch: pa.RecordBatch, ahead: Future[Any] | None) -> pa.RecordBatch:
    for attempt in range(1, TRANSIENT_TRIES):
        try:
            return _asked(stage, batch, ahead)
        except TransientError:
            ahead = None
            time.sleep(TRANSIENT_PAUSE_S * attempt)
    return _asked(stage, batch, ahead)


def _asked(stage: Stage, batch: pa.RecordBatch, ahead: Future[Any] | None) -> pa.RecordBatch:
    if isinstance(stage, Preparing):
        return stage.process(batch, ahead.result() if ahead is not None else stage.prepare(batch))
    return stage.process(batch)


def error_text(error: Exception) -> str:
    """`class: message` on one line of printable text; the class is its `kind`, if it has one that is a word."""
    message = error.what if isinstance(error, BuilderError) else str(error)
    kind = getattr(error, "kind", None)
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        kind = type(error).__name__
    clean = "".join(char if char.isprintable() else " " for char in message[: 10 * MAX_ERROR])
    return f"{kind}: {' '.join(clean.split())}"[:MAX_ERROR]


# --- alone and in a batch ---


def check_alone(stage: Stage, batch: pa.RecordBatch, answers: Sequence[tuple[int, Found]]) -> float | None:
    """Asks about a few rows of a batch alone, and compares that with the answers that they got beside the others.

    Returns:
        The largest difference: of numbers as they are, infinite between values that are no numbers and not the same,
        or what the stage's own `difference` says; None where there was nothing to compare.

    Raises:
        StageError: it is larger than the stage's `tolerance`.
    """
    tolerance: float | None = getattr(stage, "tolerance", None)
    places = [(first + i, answer.slice(i, 1)) for first, answer in _good(answers) for i in range(answer.num_rows)]
    if tolerance is None or batch.num_rows < 2 or not places:
        return None
    measure = getattr(stage, "difference", difference)
    largest = 0.0
    for i in range(min(TESTED, len(places))):
        row, within = places[i * (len(places) - 1) // max(min(TESTED, len(places)) - 1, 1)]
        [(_, alone)] = answer(stage, batch.slice(row, 1))
        if isinstance(alone, Left) or (isinstance(alone, Failure) and alone.error.startswith(TransientError.__name__)):
            continue  # that says nothing of the answers
        found = math.inf if isinstance(alone, Failure) else measure(alone, within)
        if not found <= tolerance:
            said = alone.error if isinstance(alone, Failure) else _shown(alone)
            own = getattr(stage, "batch_option", None)
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


def difference(alone: pa.RecordBatch, within: pa.RecordBatch) -> float:
    """The largest difference of two answers: of numbers as they are, infinite between other values that differ."""
    return max((_apart_by(a, b) for a, b in zip(alone.to_pylist(), within.to_pylist(), strict=True)), default=0.0)


def _apart_by(a: Any, b: Any) -> float:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((_apart_by(a[name], b[name]) for name in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max((_apart_by(*pair) for pair in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        if math.isnan(a) or math.isnan(b):
            return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
        return 0.0 if a == b else abs(a - b)
    return 0.0 if a == b else math.inf


def _shown(answer: pa.RecordBatch) -> str:
    text = str({name: f"{len(v)} bytes" if isinstance(v, bytes) else v for name, v in answer.to_pylist()[0].items()})
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."
