"""The command line in the test's own process, tasks and all: the same output without the imports of many processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from builder.cli import app
from builder.executors.base import take_task_defaults
from builder.executors.by_name import EXECUTORS
from support.in_process import InProcess

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def builder_here(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`builder ARGUMENTS`, its tasks one after the other."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as talk,
        _as_a_process(cwd),
        mock.patch.dict(EXECUTORS, local=InProcess),
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


@contextlib.contextmanager
def _as_a_process(cwd: Path | None) -> Iterator[None]:
    """Afterwards, what belongs to a process is as it was before."""
    before, folder = {number: signal.getsignal(number) for number in _SIGNALS}, Path.cwd()
    try:
        os.chdir(cwd or folder)
        with mock.patch.dict(os.environ):
            take_task_defaults()
            yield
    finally:
        os.chdir(folder)
        for number, handler in before.items():
            signal.signal(number, handler)
