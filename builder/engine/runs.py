"""Runs: plans an execution on disk, gives its tasks to an executor, adds up their results.

Owns `runs/<run>/run.json` and the results next to it. A run can be read with ls and cat, and is all that a task needs.
The three verbs that make runs have the same steps: plan the run, `execute` it, finish.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import secrets
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from builder import __version__, errors, exit_codes
from builder.config.sections import Run
from builder.errors import BuilderError, MachineError, ShardError, StageError
from builder.executors.base import KILLED, Ended, Executor, run_to_end
from builder.executors.by_name import executor_named
from builder.progress import Talk
from builder.stages import finding
from builder.store import files
from builder.store.layout import Layout, RunFiles, not_a_run

#: Packages whose versions affect the table and the tars. Stages declare the others: `Stage.packages`.
_CORE = ("duckdb", "numpy", "orjson", "pillow", "pyarrow")
T = TypeVar("T")
#: Lines of a log shown in a message.
_LOG_TAIL = 8


@dataclass
class Outcome:
    """The results of a run's tasks, added up.

    Attributes:
        counts: by name: rows, ok, failed, kept, dropped, edited ...
        refused: shards that could not be used, with the reason.
        left: shards that could not be done because of the machine, with the reason: the same command does them later.
        unfinished: the error of the machine that ended the run early, if later steps can go on nevertheless.
        run: its paths; None if there was nothing to do.
        totals: the stage's own counts, for each task.
        remarks: problems of shards that were read, by shard.
        wanted, others: names of json fields, as in `sources.base.Seen`.
    """

    counts: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    unfinished: BuilderError | None = None
    seconds: float = 0.0
    run: RunFiles | None = None
    totals: list[dict[str, Any]] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)

    def add(self, result: dict[str, Any]) -> None:
        for name, value in result.items():
            if isinstance(value, int) and not isinstance(value, bool):
                self.counts[name] = self.counts.get(name, 0) + value
        if result.get("totals"):
            self.totals.append(result["totals"])
        self.refused.update(result.get("refused") or {})
        self.remarks.update(result.get("remarks") or {})
        self.left.update(result.get("left") or {})
        self.wanted.update(result.get("wanted") or ())
        self.others.update(result.get("others") or ())

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)

    @property
    def is_clean(self) -> bool:
        """Whether nothing failed, and no shard was refused or left."""
        return not (self["failed"] or self["kept"] or self.refused or self.left or self.unfinished)


@dataclass(frozen=True)
class PlannedRun:
    """A run that is completely written to disk; none of its tasks has been started.

    Attributes:
        files: its directory.
        settings: the executor, the number of workers and the devices.
        tasks: how many tasks it has.
        label: what it does, for messages: `ingest`, `write`, or the name of a stage.
        total: how much work it is, in units of `unit`.
        unit: `rows` or `shards`.
    """

    files: RunFiles
    settings: Run
    tasks: int
    label: str
    total: int
    unit: str


def new_name(name: str) -> str:
    """The name of a new run: the time, what it does, a random tail."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return f"{now}-{name}-{secrets.token_hex(2)}"


def describe_new(
    layout: Layout, name: str, kind: str, executor: str, *, packages: Collection[str] = (), **facts: Any
) -> RunFiles:
    """Creates the directory of a new run with its `run.json`: all that a task needs, and a record for users.

    The directory appears with the file already in it. The file names the owner of the run, so that a sweep can find a
    run whose command was killed while planning.

    Args:
        name: what the run does, as for `new_name`.
        kind: the kind of its tasks, a key of `worker.TASKS`.
        executor: the name of the executor that the run is planned for.
        packages: the packages that a stage declares.
    """
    run = RunFiles(layout, new_name(name))
    data = {
        "kind": kind,
        "run": run.name,
        **facts,
        "builder": __version__,
        "python": platform.python_version(),
        "packages": versions(packages),
        **executor_named(executor).owner(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    temp = RunFiles(layout, files.temp_path(run.folder).name)
    with files.naming(layout.runs):
        files.write_atomic(temp.description, json.dumps(data, indent=1, default=str).encode())
        temp.folder.rename(files.check_no_link(run.folder))
        files.sync_folder(run.folder.parent)
    return run


def deal(shards: Sequence[T], tasks: int) -> list[list[T]]:
    """Deals shards to at most `tasks` tasks in turn, so that neighbours are read at about the same time."""
    return [list(shards[start::tasks]) for start in range(min(tasks, len(shards)))]


def write_tasks(run: RunFiles, tasks: Sequence[dict[str, Any]]) -> None:
    """Writes the work of each task of a run, as json."""
    for number, task in enumerate(tasks):
        files.write_atomic(run.task(number), json.dumps(task, indent=1).encode())


def read(run: RunFiles) -> dict[str, Any]:
    """Reads `run.json` of a run directory.

    Raises:
        ConfigError: the file does not exist or is damaged.
    """
    try:
        return files.read_object(run.description)
    except (FileNotFoundError, NotADirectoryError):
        raise not_a_run(run.folder) from None
    except ShardError as error:
        raise errors.ConfigError(
            error.what,
            where=error.where,
            fix="make its answers again, with the name of its stage: builder stage NAME --redo; if it is a run of "
            "ingest or write, run that command again",
        ) from None


def versions(more: Collection[str] = ()) -> dict[str, str]:
    """Versions of the installed packages that affect answers.

    Args:
        more: packages declared by a stage that is not built in.
    """
    found = {name: _version(name) for name in sorted({*_CORE, *finding.packages(), *more})}
    return {name: version for name, version in found.items() if version is not None}


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- the parent's side ---


def execute(planned: PlannedRun, talk: Talk, executor: Executor | None = None) -> Outcome:
    """Executes all tasks of a planned run, and adds up their results.

    Args:
        executor: by default the one in the run's settings.

    Raises:
        BuilderError: a task did not finish; the others did.
        KeyboardInterrupt: stopped by the user; everything committed is kept.
    """
    run, settings = planned.files, planned.settings
    executor = executor or executor_named(settings.executor)
    started = time.monotonic()
    progress: dict[int, tuple[int, int]] = {}
    with talk.bar(planned.label, planned.total, planned.unit) as bar:

        def on_progress(task: int, done: int, failed: int) -> None:
            progress[task] = (done, failed)
            bar.update(sum(d for d, _ in progress.values()), sum(f for _, f in progress.values()))

        submission = executor.submit(run, planned.tasks, settings)
        ended = run_to_end(submission, planned.tasks, on_progress)
    outcome = Outcome()
    broken: list[BuilderError] = []
    for end in ended:
        result = _result(run, end.number)
        outcome.add(result)
        if end.code not in (exit_codes.DONE, exit_codes.FAILED_ROWS) or not result:
            broken.append(_why(run, end, result))
    outcome.seconds, outcome.run = time.monotonic() - started, run
    if broken:
        first = broken[0]
        if len(broken) > 1:
            first.where = {**first.where, "tasks that did not finish": len(broken)}
        raise first
    return outcome


def _result(run: RunFiles, number: int) -> dict[str, Any]:
    try:
        return dict(json.loads(run.result(number).read_text("utf-8")))
    except FileNotFoundError:
        return {}


def _why(run: RunFiles, end: Ended, result: dict[str, Any]) -> BuilderError:
    """The error of a task that did not finish: its own if it could report one, else how its process ended."""
    log = {"log": run.log(end.number)}
    if said := end.error or result.get("error"):
        error = BuilderError.from_json(said)
        error.where = {**error.where, **log}
        return error
    lines = []
    with contextlib.suppress(FileNotFoundError):
        lines = run.log(end.number).read_text("utf-8", "replace").splitlines()[-_LOG_TAIL:]
    how = signal.Signals(-end.code).name if end.code < 0 else f"exit code {end.code}"
    times = f" {end.deaths} times" if end.deaths > 1 else ""
    kind: type[BuilderError] = StageError
    help_ = "see the log, fix the cause"
    if how == KILLED:
        kind = MachineError
        help_ = "see dmesg for lack of memory; end other programs or set fewer workers"
    return kind(
        f"task {end.number} was given up: its process ended with {how}{times}",
        where={**log, "last lines": "".join(f"\n    {line}" for line in lines) or "none"},
        fix=f"what was committed is kept: {help_} and run the same command again",
    )
