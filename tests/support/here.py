"""The command line in the test's own process, tasks and all: the same output without the imports of many processes."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from builder.cli import app
from builder.engine import worker
from builder.executors import local

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def builder_here(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`builder ARGUMENTS`, its tasks one after the other."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as talk,
        _as_a_process(cwd),
        mock.patch.object(local, "run", tasks_here),
    ):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(talk):
            try:
                app.main.main(list(arguments))
            except SystemExit as end:
                code = int(end.code or 0)
            else:
                raise AssertionError("a command ends by SystemExit")
        out.seek(0)
        talk.seek(0)
        return subprocess.CompletedProcess(["builder", *arguments], code, out.read(), talk.read())


def tasks_here(
    command: Callable[[int], Sequence[str]],
    tasks: int,
    log: Callable[[int], Path],
    *,
    devices: Sequence[str] = ("cpu",),
    on_progress: Callable[[int, int, int], None] = lambda task, done, failed: None,
    **_: Any,
) -> list[local.Ended]:
    """An executor as `local.run` whose tasks are done by this process, one after the other."""
    ended = []
    for number in range(tasks):
        log(number).parent.mkdir(parents=True, exist_ok=True)
        with (
            log(number).open("a", encoding="utf-8") as talk,
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            mock.patch.dict(os.environ, BUILDER_DEVICE=devices[number % len(devices)]),
        ):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(talk):
                code = worker.run_task(Path(command(number)[-2]), number)
            out.seek(0)
            for line in out:
                report = json.loads(line)
                on_progress(number, report["done"], report["failed"])
        ended.append(local.Ended(number, code, 0))
    return ended


@contextlib.contextmanager
def _as_a_process(cwd: Path | None) -> Iterator[None]:
    """Whatever a process has of its own is as before afterwards."""
    before, folder = {number: signal.getsignal(number) for number in _SIGNALS}, Path.cwd()
    try:
        os.chdir(cwd or folder)
        with mock.patch.object(faulthandler, "enable", lambda: None), mock.patch.dict(os.environ):  # pytest has its own
            local.as_a_worker()
            yield
    finally:
        os.chdir(folder)
        for number, handler in before.items():
            signal.signal(number, handler)
