"""The protocol of an executor: it does the tasks of a run somewhere, and reports their progress and how they ended.

Owns the protocol, the environment of a task, and what a task writes to its standard output. Knows nothing about data.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from builder.store.layout import RunFiles
from builder.store.owners import Liveness

# --- how a task is started ---

#: The executor that started this process; `local` if it is not set.
EXECUTOR = "BUILDER_EXECUTOR"
#: The device for a task's stage.
DEVICE = "BUILDER_DEVICE"
#: Set for a task that replaces one whose process died: the name of the signal.
DIED_OF = "BUILDER_DIED_OF"
#: Set to 1 for a task whose parent reads its standard output, and whose standard input ends when that parent dies.
PARENT_PIPE = "BUILDER_PARENT_PIPE"
#: Defaults for the environment of a task: one thread for each library, and the system's allocator for Arrow, with which
#: a task's first parquet files take 15 ms instead of 22.
DEFAULTS = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
#: The signal with which a system ends a process, for example for lack of memory. Crashes of native code have others.
KILLED = "SIGKILL"


def task_environment(executor: str, device: str, died_of: str = "") -> dict[str, str]:
    """The environment that a task's process is started with."""
    return {**DEFAULTS, **os.environ, EXECUTOR: executor, DEVICE: device, DIED_OF: died_of}


def task_command(run: RunFiles, number: int) -> list[str]:
    """The command line of one task. With `-P`, no file in the working directory is imported instead of a module."""
    return [sys.executable, "-P", "-m", "builder", "task", str(run.folder), str(number)]


def take_task_defaults() -> None:
    """Sets the defaults of a task in this process, for work whose result must be the same as in a task."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)


def task_device() -> str:
    """The device of the task that this process does."""
    return os.environ.get(DEVICE, "cpu")


def has_listener() -> bool:
    """Whether a parent reads the standard output of the task that this process does."""
    return os.environ.get(PARENT_PIPE) == "1"


# --- what a task reports ---


@dataclass(frozen=True)
class Reported:
    """The progress of a task: rows or shards that are done, and how many of them failed."""

    number: int
    done: int
    failed: int


@dataclass(frozen=True)
class Ended:
    """How a task ended.

    Attributes:
        number: the task.
        code: its last exit code (`builder.exit_codes`); negative: the signal that ended it.
        deaths: how often its process died.
        error: why it did not finish, as `BuilderError.to_json` gives it; None if it could not report that.
    """

    number: int
    code: int
    deaths: int
    error: dict[str, Any] | None = None


def progress_line(done: int, failed: int) -> str:
    """One line of a task's standard output: its progress."""
    return json.dumps({"done": done, "failed": failed})


def error_line(error: dict[str, Any]) -> str:
    """The last line of a task's standard output if it did not finish."""
    return json.dumps({"error": error})


def read_line(number: int, line: str | bytes) -> Reported | dict[str, Any] | None:
    """The progress or the error in one line of output of task `number`; None for anything else that was printed."""
    try:
        report = json.loads(line)
        if "error" in report:
            return dict(report["error"])
        return Reported(number, int(report["done"]), int(report["failed"]))
    except (ValueError, KeyError, TypeError):
        return None


# --- executors ---


class Submission(Protocol):
    """The tasks of one run, given to an executor."""

    def poll(self) -> Sequence[Reported | Ended]:
        """Returns what is new, in order, after waiting for a short time; it may be nothing.

        Every task ends once, after its last report.
        """
        ...

    def cancel(self) -> None:
        """Asks all tasks to commit what they have and end; returns when they have ended.

        A second Ctrl-C meanwhile kills them.
        """
        ...

    def kill(self) -> None:
        """Ends all tasks at once."""
        ...


class RunSettings(Protocol):
    """What every executor reads of the section [run] of a pipeline.

    Attributes:
        workers: how many tasks may be done at the same time.
        devices: each worker gets one of these, in turn.
    """

    workers: int
    devices: list[str]


class Executor(Protocol):
    """A way to do the tasks of runs: as processes of this machine, or jobs of a cluster.

    An owner is a json record of the process or job that does some work. It is written to `run.json` and next to the
    batch that a task is processing. It names its executor under the key `executor`, unless that is `local`. The owner
    in `run.json` is written before `submit`, so it cannot contain the number of a job; `liveness` is given all of
    `run.json`, including the run's name.
    """

    @property
    def name(self) -> str:
        """The value of `[run] executor`."""
        ...

    def submit(self, run: RunFiles, tasks: int, settings: RunSettings) -> Submission:
        """Takes tasks 0 to `tasks - 1` of a run.

        Each is started with `task_command` and the environment of `task_environment`.

        Args:
            settings: the section [run] as it holds for this run: an executor's own keys are among them.
        """
        ...

    def enter_task(self) -> None:
        """Prepares this process, which this executor started, to do a task."""
        ...

    def owner(self) -> dict[str, Any]:
        """The owner record of this process."""
        ...

    def liveness(self, owner: dict[str, Any]) -> Liveness:
        """Whether an owner is alive.

        Raises:
            ValueError: the record does not name an owner.
        """
        ...


def run_to_end(
    submission: Submission, tasks: int, on_progress: Callable[[int, int, int], None] = lambda task, done, failed: None
) -> list[Ended]:
    """Polls until every task has ended; returns how they ended, in the order of their numbers.

    Args:
        on_progress: called with task, done, failed.

    Raises:
        KeyboardInterrupt: the tasks were cancelled.
    """
    ended: list[Ended] = []
    try:
        while len(ended) < tasks:
            for news in submission.poll():
                if isinstance(news, Ended):
                    ended.append(news)
                else:
                    on_progress(news.number, news.done, news.failed)
    except KeyboardInterrupt:
        submission.cancel()
        raise
    except BaseException:
        submission.kill()
        raise
    return sorted(ended, key=lambda end: end.number)
