"""A problem of a shard, in words, with its fix."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from builder.errors import BuilderError
from builder.progress import shortened
from builder.sources import members

FOLD, WRITE = "builder fold", "builder write"
INGEST = f"{members.AGAIN}, then {WRITE}"
#: Characters of a value that a problem quotes.
_SHOWN = 70


class Wrong(Exception):
    """The first problem that was found in a shard.

    Args:
        what: the problem, as half a sentence.
        fix: what the user can do.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{' '.join(what.split())}; fix: {fix}")


def removing(path: Path, then: str) -> str:
    """A fix: remove a file, then run a command that makes it again."""
    return f"rm {shlex.quote(str(path))}, then {then}"


def reason(error: Exception) -> str:
    """An error's message on one line, with the row and without the fix."""
    if isinstance(error, BuilderError):
        row = f"row {error.where['row']}: " if "row" in error.where else ""
        return row + error.what
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def quoted_value(value: Any) -> str:
    """A value for a message: short, and `nothing` for None."""
    return shortened("nothing" if value is None else repr(value), _SHOWN)
