"""Shards that fail because of the machine: one is left for later, several in a row end the task."""

from __future__ import annotations

from builder import machine
from builder.errors import ConflictError, StageError, TransientError
from builder.machine import Sort

#: A task stops after this many shards in a row that failed because of a full disk or the like.
SETBACKS = 3


class Setbacks:
    """Counts shards in a row that failed because of the machine: after several, the others would fail too.

    A disk that does not return one file may return the next, so only errors that would hit every file are counted.
    """

    def __init__(self) -> None:
        self._in_a_row = 0

    def end(self) -> None:
        """Starts the count again, since a shard was done."""
        self._in_a_row = 0

    def add(self, error: BaseException) -> tuple[TransientError, bool]:
        """Counts a shard; returns why it is left, and whether to stop instead of trying the others."""
        why = machine.explained(error) if not isinstance(error, TransientError) else error
        if machine.sort_of(error) in (None, Sort.ACCESS):
            return why, False
        self._in_a_row += 1
        if self._in_a_row < SETBACKS:
            return why, False
        why.where = {**why.where, "shards in a row": self._in_a_row}
        return why, True


def is_left(error: BaseException) -> bool:
    """Whether a shard is left for later: the error is one of the machine, or any other OSError of the engine."""
    if isinstance(error, ConflictError | StageError):
        return False
    return isinstance(error, OSError | TransientError) or machine.is_of_the_machine(error)
