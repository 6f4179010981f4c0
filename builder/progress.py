"""Progress and messages on stderr: bars on a terminal, plain lines in a log.

Owns what users see while work runs. Knows nothing about the work itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

#: Seconds between two progress lines of one task in a log.
_LOG_EVERY_S = 15.0
#: How many things a line lists; the others are only counted.
EXAMPLES = 3


class Bar(Protocol):
    """Shows how far a piece of work is."""

    def update(self, done: int, failed: int = 0) -> None:
        """Shows that `done` units are finished, `failed` of them without an answer."""


class Talk:
    """The messages of a command while it works."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Prints lines, with control characters escaped."""
        if not self._quiet:
            print(plain_lines(text), file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        """A progress bar for `total` units."""
        if self._quiet:
            yield _Silent()
        elif sys.stderr.isatty():
            yield from _rich_bar(label, total, unit)
        else:
            log = _Log(label, total, unit)
            yield log
            log.end()


class _Silent:
    def update(self, done: int, failed: int = 0) -> None:
        """Says nothing."""


class _Log:
    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._started = self._said = time.monotonic()
        self._done = self._failed = 0

    def update(self, done: int, failed: int = 0) -> None:
        self._done, self._failed = done, failed
        if time.monotonic() - self._said >= _LOG_EVERY_S:
            self._said = time.monotonic()
            self._line()

    def end(self) -> None:
        self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-3)
        failed = f", {self._failed} failed" if self._failed else ""
        rate = self._done / seconds
        speed = f"{rate:.0f}" if rate >= 0.95 else f"{rate:.2g}"
        per_second = f", {speed} {self._unit}/s" if rate else ""
        print(
            f"{self._label}: {self._done} of {self._total} {self._unit}{failed}, {seconds:.1f} s{per_second}",
            file=sys.stderr,
            flush=True,
        )


def _rich_bar(label: str, total: int, unit: str) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[failed]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, failed="")

        class RichBar:
            def update(self, done: int, failed: int = 0) -> None:
                progress.update(task, completed=done, failed=f"{failed} failed" if failed else "")

        yield RichBar()


def plain(text: str) -> str:
    """Text that is safe on a terminal: control characters and bidirectional marks are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def plain_lines(text: str) -> str:
    """`plain` line by line: newlines are kept."""
    return "\n".join(plain(line) for line in text.split("\n"))


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: a longer one ends in `...`."""
    return text if len(text) <= most else text[: most - 3] + "..."


def few(things: Sequence[object]) -> str:
    """The first things of a list, and the number of the others."""
    more = f" and {len(things) - EXAMPLES} more" if len(things) > EXAMPLES else ""
    return ", ".join(str(thing) for thing in things[:EXAMPLES]) + more
