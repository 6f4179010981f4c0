"""Runs tasks 0..n-1 as processes of this machine.

Owns worker processes: one per device in turn, replaced when they die, stopped when asked. Knows nothing of data: a
worker prints one json a line, `{"done": rows, "failed": rows}`, at the end perhaps `{"error": why}`, and its exit code
says how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.store import files

#: Exit codes of a task: done, done with failed rows, stopped when asked; any other did not finish.
DONE, DONE_WITH_FAILURES, STOPPED = 0, 3, 130
#: Deaths of one task's process after which it is given up. A row that kills the process is found by halving its batch,
#: which costs two deaths a halving.
MAX_DEATHS = 40
#: What a process has to do, rows or shards, for the deaths before its own to count no more: a task may run for weeks.
FORGIVEN_AFTER = 10_000
#: Deaths without any halving between them, after which a task is given up: the process dies before its first batch.
MAX_IDLE_DEATHS = 3
#: Seconds in which the last lines of a worker that ended are awaited.
_LAST_WORDS_S = 1.0
#: Environment of a worker where the caller's says nothing: one thread each, and the allocator of the system for Arrow,
#: with which a worker's first parquet files take 15 ms instead of 22.
DEFAULTS = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
#: Environment of a worker that takes the place of one that died: the name of the signal.
DIED_OF = "BUILDER_DIED_OF"
#: Set for a worker whose standard input ends when its parent dies.
PARENT_PIPE = "BUILDER_PARENT_PIPE"


@dataclass(frozen=True)
class Ended:
    """How a task ended: its number, its last exit code (negative: the signal), how often its process died.

    Attributes:
        error: what its last process told of why it did not finish; none if it could not.
    """

    number: int
    code: int
    deaths: int
    error: dict[str, Any] | None = None


@dataclass
class _Worker:
    number: int
    slot: int
    process: subprocess.Popen[bytes]
    log: Path
    error: dict[str, Any] | None = None
    #: What its first report says is done, and its last.
    begun: int | None = None
    done: int = 0


def run(
    command: Callable[[int], Sequence[str]],
    tasks: int,
    log: Callable[[int], Path],
    *,
    workers: int,
    devices: Sequence[str] = ("cpu",),
    in_hand: Callable[[int], Path] | None = None,
    on_progress: Callable[[int, int, int], None] = lambda task, done, failed: None,
) -> list[Ended]:
    """Runs every task and returns how each ended.

    Args:
        command: the command line of a task.
        log: where its standard error goes.
        in_hand: the file that changes whenever a task begins a batch: a death is idle if it did not.
        on_progress: called with task, rows done, rows failed.

    Raises:
        KeyboardInterrupt: asked to stop; every worker has committed what it had and ended.
    """
    return _Pool(command, log, workers, devices, in_hand, on_progress).run(tasks)


class _Pool:
    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        log: Callable[[int], Path],
        workers: int,
        devices: Sequence[str],
        in_hand: Callable[[int], Path] | None,
        on_progress: Callable[[int, int, int], None],
    ) -> None:
        self._command, self._log, self._workers = command, log, workers
        self._devices, self._in_hand, self._on_progress = list(devices), in_hand, on_progress
        self._events: queue.Queue[tuple[_Worker, bytes | None]] = queue.Queue()
        self._running: dict[int, _Worker] = {}
        self._deaths: dict[int, int] = {}
        self._idle: dict[int, int] = {}
        self._last: dict[int, str] = {}
        self._died_of: dict[int, str] = {}

    def run(self, tasks: int) -> list[Ended]:
        waiting = list(range(tasks))
        ended: list[Ended] = []
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._workers:
                    if not self._try_to_start(waiting[0]):
                        break
                    waiting.pop(0)
                worker, line = self._events.get()
                if line is not None:
                    self._report(worker, line)
                    continue
                code = worker.process.wait()
                del self._running[worker.slot]
                if self._again(worker, code):
                    waiting.insert(0, worker.number)
                else:
                    ended.append(Ended(worker.number, code, self._deaths.get(worker.number, 0), worker.error))
        except KeyboardInterrupt:
            self._stop()
            raise
        except BaseException:
            self._kill()
            raise
        return sorted(ended, key=lambda end: end.number)

    def _try_to_start(self, number: int) -> bool:
        """Starts a task's process; False if the machine gives no more processes or files beside those that run."""
        try:
            self._start(number)
        except OSError:
            if not self._running:
                raise
            self._workers = len(self._running)
            return False
        return True

    def _start(self, number: int) -> None:
        slot = next(i for i in range(self._workers) if i not in self._running)
        path = self._log(number)
        environment = {
            **DEFAULTS,
            **os.environ,
            PARENT_PIPE: "1",
            "BUILDER_DEVICE": self._devices[slot % len(self._devices)],
            DIED_OF: self._died_of.get(number, ""),
        }
        with files.open_log(path) as log:
            process = subprocess.Popen(
                list(self._command(number)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which asks its workers to stop
            )
        worker = _Worker(number, slot, process, path)
        self._running[slot] = worker
        listener = threading.Thread(target=self._listen, args=(worker,), daemon=True)
        listener.start()
        threading.Thread(target=self._wait, args=(worker, listener), daemon=True).start()

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._events.put((worker, line))

    def _wait(self, worker: _Worker, listener: threading.Thread) -> None:
        """Tells when a worker ended; a process that its stage left behind may hold its output open for ever."""
        worker.process.wait()
        listener.join(_LAST_WORDS_S)
        self._events.put((worker, None))

    def _report(self, worker: _Worker, line: bytes) -> None:
        try:
            report = json.loads(line)
            if "error" in report:
                worker.error = dict(report["error"])
                return
            done, failed = int(report["done"]), int(report["failed"])
        except (ValueError, KeyError, TypeError):
            with (
                contextlib.suppress(OSError),
                files.open_log(worker.log) as log,
            ):  # on a full disk the work matters more
                log.write(line)  # something that a stage printed
            return
        worker.begun, worker.done = done if worker.begun is None else worker.begun, done
        self._on_progress(worker.number, done, failed)

    def _again(self, worker: _Worker, code: int) -> bool:
        """Whether a task whose process ended so is tried again: after a death that found out something."""
        if code >= 0:
            return False
        number = worker.number
        if worker.done - (worker.begun or 0) >= FORGIVEN_AFTER:
            self._deaths[number] = 0
        self._deaths[number] = self._deaths.get(number, 0) + 1
        self._died_of[number] = signal.Signals(-code).name
        now = self._read_in_hand(number)
        self._idle[number] = 0 if now != self._last.get(number, "") else self._idle.get(number, 0) + 1
        self._last[number] = now
        return self._deaths[number] < MAX_DEATHS and self._idle[number] < MAX_IDLE_DEATHS

    def _read_in_hand(self, number: int) -> str:
        if self._in_hand is None:
            return ""
        try:
            return self._in_hand(number).read_text("utf-8")
        except FileNotFoundError:
            return ""

    def _stop(self) -> None:
        for worker in self._running.values():
            worker.process.send_signal(signal.SIGTERM)
        try:
            for worker in self._running.values():
                worker.process.wait()
        except KeyboardInterrupt:
            self._kill()

    def _kill(self) -> None:
        for worker in self._running.values():
            worker.process.kill()
            worker.process.wait()


def as_a_worker() -> None:
    """Gives this process the environment of a worker, for what shall answer as one does."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)


def task_command(run_folder: Path, number: int) -> list[str]:
    """The command line of one task; `-P`: nothing in the working directory is taken for a module."""
    return [sys.executable, "-P", "-m", "builder", "task", str(run_folder), str(number)]


def die_with_parent() -> None:
    """In a worker: ends the process as soon as the parent that holds its standard input is gone."""
    if os.environ.get(PARENT_PIPE) != "1":
        return

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
