"""Does one task of a run in this process, which an executor has started.

`TASKS` has a function for each kind of run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder import exit_codes, machine
from builder.engine import runs, workset
from builder.engine.batches import error_text
from builder.engine.in_hand import InHand, Verdict
from builder.engine.setbacks import Setbacks
from builder.engine.task import run_stage_task
from builder.engine.task_state import TaskSettings
from builder.errors import BuilderError, MachineError, ShardError, StageError, TransientError
from builder.executors.base import error_line, has_listener, progress_line, task_device
from builder.executors.by_name import own_executor
from builder.hybrid import shard_plan, splice
from builder.hybrid.edit import Rules
from builder.machine import asked_again
from builder.progress import plain_lines
from builder.sources.base import MAX_NAMES, Seen
from builder.sources.ingest import ingest_shard
from builder.sources.kinds import KINDS
from builder.stages.finding import find, own_code
from builder.store import files
from builder.store.layout import RunFiles
from builder.table import partitions


class _Stop:
    """Whether this process was asked to stop; it then commits what it has and ends."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


@dataclass(frozen=True)
class RunTask:
    """One task of a run.

    Attributes:
        run: the files of the run.
        number: the number of the task.
        data: the run's description, `run.json`.
        is_stopping: whether the process was asked to stop.
    """

    run: RunFiles
    number: int
    data: dict[str, Any]
    is_stopping: Callable[[], bool]


def run_task(folder: Path, number: int) -> int:
    """Does task `number` of a run and returns its exit code; writes what it did, or why it failed, to its result file.

    Args:
        folder: the run's directory.

    Raises:
        ConfigError: `folder` is not a run's directory.
    """
    run = RunFiles.at(folder.absolute())
    data = runs.read(run)
    stop = _Stop()
    faulthandler.enable()  # a crash in native code leaves a traceback in the log
    own_executor().enter_task()
    try:
        result = TASKS[data["kind"]](RunTask(run, number, data, stop))
        files.write_atomic(run.result(number), json.dumps(result, default=str).encode(), durable=False)
    except (Exception, SystemExit) as error:
        _report_failure(run, number, error)
        return exit_codes.UNFINISHED
    if stop():
        return exit_codes.INTERRUPTED
    is_clean = not (result.get("failed") or result.get("kept") or result.get("refused") or result.get("left"))
    return exit_codes.DONE if is_clean else exit_codes.FAILED_ROWS


def _report_progress(done: int, failed: int) -> None:
    """Reports progress. If the parent is gone, the task still goes on to its checkpoint."""
    with contextlib.suppress(BrokenPipeError):
        print(progress_line(done, failed), flush=True)


def _report_failure(run: RunFiles, number: int, error: BaseException) -> None:
    """Reports why a task did not finish: to its log, its parent and its result file, as far as each works."""
    if isinstance(error, BuilderError):
        why = error
    elif isinstance(error, OSError) or machine.is_of_the_machine(error):
        why = machine.explained(error)
    else:
        fix = f"see the traceback in {run.log(number)}, fix the cause, run the same command again"
        why = StageError(error_text(error), fix=fix)
    text = error_line(why.to_json())
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        if why is not error or why.__cause__ is not None:
            print(plain_lines("".join(traceback.format_exception(error))), file=sys.stderr)
        print(plain_lines(str(why)), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        if has_listener():
            print(text, flush=True)
    with contextlib.suppress(OSError):
        files.write_atomic(run.result(number), text.encode(), durable=False)


# --- the kinds of tasks ---


def _stage_task(task: RunTask) -> dict[str, Any]:
    """Asks a stage about rows of a work set."""
    run, data = task.run, task.data
    kind = find(data["stage"], data["python_file"])
    settings = TaskSettings(**data["settings"])
    with own_code(kind, data["stage"]):
        stage = kind(kind.Options.model_validate_json(json.dumps(data["options"])))
        stage.workers = run.tasks
        result = run_stage_task(
            run.layout, run, task.number, stage, settings,
            device=task_device(), progress=_report_progress, stopping=task.is_stopping,
        )  # fmt: skip
    return result.to_json()


def _ingest_task(task: RunTask) -> dict[str, Any]:
    """Reads shards of the source into the table."""
    run, data = task.run, task.data
    source = KINDS[data["source"]["kind"]].from_json(data["source"])
    remarks: dict[str, list[str]] = {}
    seen = Seen()
    result: dict[str, Any] = {"shards": 0, "rows": 0, "failed": 0, "changed": 0, "remarks": remarks}
    work = json.loads(run.task(task.number).read_text("utf-8"))
    paths = {shard: Path(path) for shard, path in work["paths"].items()}
    names_of_shards = list(paths)

    def ingest(done: int) -> None:
        shard = names_of_shards[done]
        path = paths[shard]
        try:
            ingested = ingest_shard(run.layout, source, shard, path, run.name)
        except OSError as error:
            if machine.is_of_the_machine(error) or error.filename not in (None, str(path)):
                raise
            fix = f"put it back or take it out of {source.setting}, then run the same command again"
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

    undone = _shard_by_shard(task, names_of_shards, ingest)
    names = {"wanted": sorted(seen.wanted), "others": sorted(seen.others)[:MAX_NAMES]}
    return {**result, **names, **undone}


def _write_task(task: RunTask) -> dict[str, Any]:
    """Writes hybrid shards."""
    run, data = task.run, task.data
    folder = data.get("folder")
    layout = run.layout if folder is None else replace(run.layout, output=Path(folder))
    result: dict[str, Any] = {"shards": 0}
    slices = workset.read_task(run, task.number)

    def write(done: int) -> None:
        part = slices[done]
        state = partitions.partition_state(layout, part.shard)
        if state is None or state.rows != part.rows:
            raise ShardError("the shard was ingested again", where={"shard": part.shard}, fix="builder write")
        rows = workset.read_slice(run, part).to_pylist() if part.count else []
        editing = Rules(**data["editing"])
        plan = shard_plan.plan_shard(layout, part.shard, state, rows, data["image_stage"], editing)
        written = splice.write_shard(layout, plan)
        result["shards"] += 1
        for name, value in vars(written).items():
            if not isinstance(value, bool):
                result[name] = result.get(name, 0) + value
        result["no_end_mark"] = result.get("no_end_mark", 0) + (0 if written.source_end_mark else 1)

    undone = _shard_by_shard(task, [part.shard for part in slices], write)
    return {**result, **undone}


#: The function for a task of each kind of run; returns the content of its result file.
TASKS: dict[str, Callable[[RunTask], dict[str, Any]]] = {
    "stage": _stage_task,
    "ingest": _ingest_task,
    "write": _write_task,
}


# --- shard by shard ---


def _shard_by_shard(task: RunTask, shards: Sequence[str], do: Callable[[int], None]) -> dict[str, dict[str, str]]:
    """Does the shards of a task in order; returns those that were `refused` and those that were `left`, with reasons.

    A shard in which the process died twice is also refused or left; the next process goes on with the shard after it.

    Args:
        do: does the shard at a position in `shards`.

    Raises:
        TransientError: several shards in a row failed because of the machine, and the others would fail too.
    """
    refused: dict[str, str] = {}
    left: dict[str, str] = {}
    in_hand, setbacks = InHand(task.run.in_hand(task.number)), Setbacks()
    for done, shard in enumerate(shards):
        if task.is_stopping():
            break
        try:
            _check_in_hand(in_hand, shard, task.run.log(task.number))
            in_hand.begin(shard, [0])
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
        _report_progress(done + 1, len(refused) + len(left))
    with contextlib.suppress(OSError):  # harmless if it cannot be deleted
        files.remove(task.run.in_hand(task.number))
    return {"refused": refused, "left": left}


def _check_in_hand(in_hand: InHand, shard: str, log: Path) -> None:
    """Raises an error for a shard in which the process died twice.

    Raises:
        ShardError: the process died by itself: the shard is refused.
        MachineError: the system killed it: the shard is left.
    """
    verdict = in_hand.verdict(shard, [0])
    if verdict is Verdict.LEFT:
        raise MachineError(
            "the system killed the process twice in this shard",
            where={"log": log},
            fix="see dmesg for lack of memory; end other programs or set fewer workers; run the same command again",
        )
    if verdict is Verdict.FAILED:
        raise ShardError(
            "the process died twice in this shard",
            where={"log": log},
            fix="see the log; fix the cause and run the same command again, or take the shard out of the pipeline",
        )
