"""Runs tasks as processes of this machine.

Owns worker processes: they use the devices in turn, are replaced when they die, and stop when asked.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.executors.base import (
    PARENT_PIPE,
    Ended,
    Reported,
    RunSettings,
    Submission,
    has_listener,
    read_line,
    task_command,
    task_environment,
)
from builder.store import files
from builder.store.layout import RunFiles
from builder.store.owners import Liveness, process_liveness

#: Deaths of a task's processes after which the task is given up. A row that kills the process is found by halving its
#: batch, with two deaths for each halving.
MAX_DEATHS = 40
#: If a process has done this many rows or shards, earlier deaths no longer count: a task may run for weeks.
FORGIVEN_AFTER = 10_000
#: Deaths in a row with the same batch, or none, in hand after which a task is given up, as it makes no progress.
MAX_IDLE_DEATHS = 3
#: Seconds to wait for the last lines of a worker that ended.
_LAST_WORDS_S = 1.0
#: Seconds that a poll waits for news.
_POLL_S = 1.0


@dataclass
class _Worker:
    number: int
    slot: int
    process: subprocess.Popen[bytes]
    log: Path
    error: dict[str, Any] | None = None
    #: The number done in its first report, and in its last.
    begun: int | None = None
    done: int = 0


class LocalExecutor:
    """Runs every task in a separate process on this machine."""

    name = "local"

    def submit(self, run: RunFiles, tasks: int, settings: RunSettings) -> Submission:
        def command(number: int) -> Sequence[str]:
            return task_command(run, number)

        return TaskPool(
            command,
            tasks,
            run.log,
            workers=settings.workers,
            devices=settings.devices,
            in_hand=run.in_hand,
            executor=self.name,
        )

    def enter_task(self) -> None:
        die_with_parent()

    def owner(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def liveness(self, owner: dict[str, Any]) -> Liveness:
        host, pid = owner.get("host"), owner.get("pid")
        if not isinstance(host, str) or not isinstance(pid, int):
            raise ValueError(f"it does not name a process: host {host!r}, pid {pid!r}")
        return process_liveness(host, pid)


class TaskPool:
    """Processes that do tasks 0 to `tasks - 1`. `poll` starts them, and replaces those that die.

    Args:
        command: returns the command line of a task.
        log: returns the file for a task's standard error.
        workers: how many processes run at the same time; fewer if the machine does not allow as many.
        devices: each worker gets one of these, in turn.
        in_hand: returns the file that changes whenever a task begins a batch. If a task's processes die again and again
            with the same content in it, the task makes no progress.
        executor: the name of the executor that the tasks belong to.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        tasks: int,
        log: Callable[[int], Path],
        *,
        workers: int,
        devices: Sequence[str] = ("cpu",),
        in_hand: Callable[[int], Path] | None = None,
        executor: str = "local",
    ) -> None:
        self._command, self._log, self._workers, self._executor = command, log, workers, executor
        self._devices, self._in_hand = list(devices), in_hand
        self._waiting = list(range(tasks))
        self._events: queue.Queue[tuple[_Worker, bytes | None]] = queue.Queue()
        self._running: dict[int, _Worker] = {}
        self._deaths: dict[int, int] = {}
        self._idle: dict[int, int] = {}
        self._last: dict[int, str] = {}
        self._died_of: dict[int, str] = {}

    def poll(self) -> list[Reported | Ended]:
        """The next report of a process, or a task that ended.

        Raises:
            OSError: not even one process can be started.
        """
        while self._waiting and len(self._running) < self._workers:
            if not self._try_to_start(self._waiting[0]):
                break
            self._waiting.pop(0)
        try:
            worker, line = self._events.get(timeout=_POLL_S)
        except queue.Empty:
            return []
        news = self._ended(worker) if line is None else self._reported(worker, line)
        return [] if news is None else [news]

    def _try_to_start(self, number: int) -> bool:
        """Starts a task's process; False if the machine allows no more processes or open files than now."""
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
        device = self._devices[slot % len(self._devices)]
        environment = task_environment(self._executor, device, self._died_of.get(number, ""))
        with files.open_log(path) as log:
            process = subprocess.Popen(
                list(self._command(number)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment, PARENT_PIPE: "1"},
                start_new_session=True,  # Ctrl-C reaches only the parent, which asks its workers to stop
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
        """Reports that a worker has ended, without waiting for the end of its output: a child may hold that open."""
        worker.process.wait()
        listener.join(_LAST_WORDS_S)
        self._events.put((worker, None))

    def _reported(self, worker: _Worker, line: bytes) -> Reported | None:
        """The progress in a line of a worker's output; None for other lines."""
        report = read_line(worker.number, line)
        if isinstance(report, Reported):
            if worker.begun is None:
                worker.begun = report.done
            worker.done = report.done
            return report
        if report is not None:
            worker.error = report
            return None
        # Printed by a stage: it goes to the log. On a full disk it is lost, as the work matters more.
        with contextlib.suppress(OSError), files.open_log(worker.log) as log:
            log.write(line)
        return None

    def _ended(self, worker: _Worker) -> Ended | None:
        """How the task of a worker that ended has ended; None if another process tries it again."""
        code = worker.process.wait()
        del self._running[worker.slot]
        if self._is_tried_again(worker, code):
            self._waiting.insert(0, worker.number)
            return None
        return Ended(worker.number, code, self._deaths.get(worker.number, 0), worker.error)

    def _is_tried_again(self, worker: _Worker, code: int) -> bool:
        """Whether another process goes on with a task: after a death, unless there were too many."""
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

    def cancel(self) -> None:
        """Asks the processes to commit and end, and waits for them; another Ctrl-C kills them."""
        for worker in self._running.values():
            worker.process.send_signal(signal.SIGTERM)
        try:
            for worker in self._running.values():
                worker.process.wait()
        except KeyboardInterrupt:
            self.kill()

    def kill(self) -> None:
        """Kills the processes and waits for their end."""
        for worker in self._running.values():
            worker.process.kill()
            worker.process.wait()


def die_with_parent() -> None:
    """In a worker: ends the process as soon as its parent, which holds its standard input open, is gone."""
    if not has_listener():
        return

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
