"""Executors whose tasks are done without processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from unittest import mock

from builder.engine import worker
from builder.executors import base
from builder.executors.base import Ended, Reported
from builder.executors.local import LocalExecutor
from builder.store.layout import RunFiles

News = Sequence[Reported | Ended]


class Tasks:
    """What an executor was given, as a poll after a poll."""

    def __init__(self, news: Iterable[News]) -> None:
        self._news = iter(news)

    def poll(self) -> News:
        return next(self._news)

    def cancel(self) -> None:
        """Nothing goes on between two polls."""

    def kill(self) -> None:
        """Nothing goes on between two polls."""


class InProcess(LocalExecutor):
    """Does the tasks of a run in this process: one for each poll.

    Args:
        is_logged: whether what a task prints goes to its log, as it does where it has a process of its own.
    """

    def __init__(self, *, is_logged: bool = True) -> None:
        self._is_logged = is_logged

    def submit(self, run: RunFiles, tasks: int, settings: base.RunSettings) -> Tasks:
        devices = settings.devices
        return Tasks(self._do(run, number, devices[number % len(devices)]) for number in range(tasks))

    def _do(self, run: RunFiles, number: int, device: str) -> News:
        with _task_of_its_own(), mock.patch.dict(os.environ, {base.EXECUTOR: self.name, base.DEVICE: device}):
            if not self._is_logged:
                return [Ended(number, worker.run_task(run.folder, number), 0)]
            with _talk_in(run, number) as lines:
                code = worker.run_task(run.folder, number)
        said = [base.read_line(number, line) for line in lines]
        return [*(one for one in said if isinstance(one, Reported)), Ended(number, code, 0)]


@contextlib.contextmanager
def _task_of_its_own() -> Iterator[None]:
    """What a task does to its process is undone, or not done at all."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with mock.patch.object(worker.faulthandler, "enable", lambda: None):  # pytest has its own
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _talk_in(run: RunFiles, number: int) -> Iterator[list[str]]:
    """Standard error goes to a task's log; the lines of standard output are there at the end."""
    lines: list[str] = []
    run.log(number).parent.mkdir(parents=True, exist_ok=True)
    with run.log(number).open("a", encoding="utf-8") as talk, tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(talk):
            yield lines
        out.seek(0)
        lines += out
