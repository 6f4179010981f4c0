"""One task of a run in this process: what an executor starts."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from builder import machine
from builder.engine import workset
from builder.engine.batches import error_text
from builder.engine.in_hand import Deaths, Verdict
from builder.engine.runs import read
from builder.engine.setbacks import Setbacks
from builder.engine.task import run_stage_task
from builder.engine.task_state import TaskSettings
from builder.errors import BuilderError, MachineError, ShardError, StageError, TransientError
from builder.executors import local
from builder.hybrid import writer
from builder.hybrid.edited_sample import Rules
from builder.machine import asked_again
from builder.progress import plain_lines
from builder.sources.base import Seen
from builder.sources.ingest import ingest_shard
from builder.sources.kinds import KINDS
from builder.sources.tars.samples import MAX_NAMES
from builder.stages.finding import find, own_code
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import partitions
from builder.table.sql_text import Sql

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
    source = KINDS[data["source"]["kind"]].from_json(data["source"])
    remarks: dict[str, list[str]] = {}
    seen = Seen()
    result: dict[str, Any] = {"shards": 0, "rows": 0, "failed": 0, "changed": 0, "remarks": remarks}
    paths = {shard: Path(path) for shard, path in json.loads(run.task(number).read_text("utf-8"))["paths"].items()}
    names_of_shards = list(paths)

    def ingest(done: int) -> None:
        shard = names_of_shards[done]
        path = paths[shard]
        try:
            ingested = ingest_shard(_layout(run), source, shard, path, run.folder.name)
        except OSError as error:
            if machine.is_of_the_machine(error) or error.filename not in (None, str(path)):
                raise
            fix = "put it back or take it out of dataset.shards, then run the same command again"
            raise ShardError(f"the shard cannot be read: {error.strerror}", where={"file": path}, fix=fix) from error
        read = ingested.read
        result["shards"] += 1
        result["rows"] += ingested.rows
        result["failed"] += ingested.failed
        for name, count in read.counts.items():
            result[name] = result.get(name, 0) + count
        seen.wanted |= read.seen.wanted
        if len(seen.others) < MAX_NAMES:
            seen.others |= read.seen.others
        result["changed"] += ingested.changed
        if read.remarks:
            remarks[shard] = read.remarks

    undone = _shard_by_shard(run, number, names_of_shards, ingest, stop)
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
