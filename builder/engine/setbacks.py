"""Shards that the machine keeps from being done: one is left for later, several in a row end the task."""

from __future__ import annotations

from builder import machine
from builder.errors import ConflictError, StageError, TransientError
from builder.machine import Sort

#: Shards in a row that a full disk or the like keeps from being done, after which a task stops.
SETBACKS = 3


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


def is_left(error: BaseException) -> bool:
    """Whether a shard is left for later: the error is the machine's, or the system's answer to the engine itself."""
    if isinstance(error, ConflictError | StageError):
        return False
    return isinstance(error, OSError | TransientError) or machine.is_of_the_machine(error)
