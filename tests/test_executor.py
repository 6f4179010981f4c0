"""The executor is a seam: a run is planned, done by the executor that the pipeline names, and finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.engine.in_hand import InHand
from builder.engine.runs import PlannedRun, execute
from builder.engine.work import Choice
from builder.executors import base
from builder.executors.base import Ended, Reported, RunSettings, run_to_end
from builder.executors.by_name import EXECUTORS, executor_named, liveness_of
from builder.progress import Talk
from builder.store.layout import RunFiles
from builder.store.owners import Liveness
from builder.verbs.gc import collect_garbage
from builder.verbs.ingest import finish_ingest_run, plan_ingest_run
from builder.verbs.snapshot import Snapshot
from builder.verbs.stage import finish_stage_run, plan_stage_run
from builder.verbs.write import finish_write_run, plan_write_run
from conftest import Workspace, ingest_here
from support.in_process import InProcess, Tasks
from support.planned import SQL, section

QUIET = Talk(quiet=True)
HOUR_S = 3600
WRITE = "select shard, row, uid, null as image_path, note as caption from samples where note is not null and row = 0"


class Elsewhere(InProcess):
    """An executor whose owners are jobs; what is known of a job is what the test says."""

    name = "elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[tuple[str, int, int, list[str]]] = []
        self.known = Liveness.CANNOT_BE_ASKED

    def submit(self, run: RunFiles, tasks: int, settings: RunSettings) -> Tasks:
        kind = json.loads(run.description.read_text())["kind"]
        self.submitted.append((kind, tasks, settings.workers, list(settings.devices)))
        return super().submit(run, tasks, settings)

    def owner(self) -> dict[str, Any]:
        return {"executor": self.name, "job": 7}

    def liveness(self, owner: dict[str, Any]) -> Liveness:
        assert owner["job"] == 7
        return self.known


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """A second executor in the table, and no process can be started."""
    executor = Elsewhere()
    monkeypatch.setitem(EXECUTORS, executor.name, lambda: executor)

    def no_process(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    return executor


@pytest.fixture
def made(workspace: Callable[..., Workspace], tmp_path: Path) -> Workspace:
    """Two shards of eight samples, not ingested, and the stage `note`."""
    (tmp_path / "note.sql").write_text(SQL)
    return workspace(stages=section("Note", sql=f"{tmp_path}/note.sql"), workers=2)


def inside(planned: PlannedRun) -> list[str]:
    folder = planned.files.folder
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def plan_of(made: Workspace, verb: str) -> Any:
    pipeline = made.load()
    if verb == "ingest":
        return plan_ingest_run(Snapshot(pipeline), QUIET)
    if verb == "stage":
        return plan_stage_run(Snapshot(pipeline), "note", Choice(), QUIET)
    return plan_write_run(Snapshot(pipeline), QUIET)


def test_ingest_stage_and_write_have_the_same_three_steps(made: Workspace, elsewhere: Elsewhere) -> None:
    """Planned by one pipeline object and finished with another: the plan is on disk and in its value."""
    expected = {
        "ingest": (["run.json", "tasks/00000.json", "tasks/00001.json"], "shards", 2),
        "stage": (["run.json", "tasks/00000.json", "tasks/00001.json", "workset.parquet"], "rows", 16),
        "write": (["run.json", "tasks/00000.json", "tasks/00001.json"], "shards", 2),
    }
    for verb, (files, unit, total) in expected.items():
        planned = plan_of(made, verb)
        assert inside(planned) == files
        assert (planned.tasks, planned.unit, planned.total) == (2, unit, total)
        assert elsewhere.submitted == []
        outcome = execute(planned, QUIET, elsewhere)
        assert elsewhere.submitted.pop() == (verb, 2, 2, ["cpu"])
        pipeline = made.load()
        if verb == "ingest":
            finish_ingest_run(Snapshot(pipeline), planned, outcome, QUIET)
            assert outcome["rows"] == 16
        elif verb == "stage":
            finish_stage_run(Snapshot(pipeline), planned, outcome, QUIET)
            assert outcome["ok"] == 16
        else:
            assert not (made.root / "shards/sizes.json").exists()
            finish_write_run(pipeline, outcome, QUIET)
            assert sorted(json.loads((made.root / "shards/sizes.json").read_text())) == ["00000000.tar", "00000001.tar"]
        assert outcome.run == planned.files
    assert [plan_of(made, verb) for verb in expected] == [None, None, None]


def test_a_planned_run_has_answered_nothing_yet(made: Workspace, elsewhere: Elsewhere) -> None:
    ingest_here(made.load())
    planned = plan_of(made, "stage")
    assert made.rows("select count(*) from samples where note_status is not null") == [(0,)]
    assert execute(planned, QUIET, elsewhere)["ok"] == 16
    assert made.rows("select count(*), count(distinct note_run) from samples where note_status = 'ok'") == [(16, 1)]


def test_the_executor_that_the_pipeline_names_is_used(made: Workspace, elsewhere: Elsewhere) -> None:
    made.run("run", "--set", 'run.executor="elsewhere"', "--set", 'run.devices=["a", "b"]')
    assert elsewhere.submitted == [
        ("ingest", 2, 2, ["a", "b"]), ("stage", 2, 2, ["a", "b"]), ("write", 2, 2, ["a", "b"]),
    ]  # fmt: skip
    for path in (made.root / "runs").iterdir():
        data = json.loads((path / "run.json").read_text())
        assert (data["executor"], data["job"], "pid" in data) == ("elsewhere", 7, False)


def test_a_stage_may_name_another_executor(made: Workspace, elsewhere: Elsewhere) -> None:
    made.run("run", "--set", 'stages.note.run.executor="elsewhere"')
    assert elsewhere.submitted == [("stage", 2, 2, ["cpu"])]


def test_a_run_of_this_machine_is_described_as_ever(made: Workspace, elsewhere: Elsewhere) -> None:
    """Without a key of its own: older versions read it, too."""
    data = json.loads(plan_of(made, "ingest").files.description.read_text())
    assert list(data) == [
        "kind", "run", "source", "pipeline", "set", "builder", "python", "packages", "host", "pid", "started",
    ]  # fmt: skip
    assert data["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("known", "hours", "is_kept"),
    [
        (Liveness.LIVES, 49, True),
        (Liveness.CANNOT_BE_ASKED, 47, True),
        (Liveness.CANNOT_BE_ASKED, 49, False),
        (Liveness.DEAD, 0, False),
    ],
)
def test_a_run_is_swept_when_its_owner_is_gone(
    made: Workspace, elsewhere: Elsewhere, known: Liveness, hours: float, is_kept: bool
) -> None:
    ingest_here(made.load())
    planned = plan_stage_run(Snapshot(made.load('run.executor="elsewhere"')), "note", Choice(), QUIET)
    assert planned is not None
    elsewhere.known = known
    then = time.time() - hours * HOUR_S
    os.utime(planned.files.folder, (then, then))
    collect_garbage(made.load(), QUIET, dry_run=False)
    assert planned.files.folder.exists() is is_kept


def test_a_run_of_an_executor_of_another_version_cannot_be_asked(elsewhere: Elsewhere) -> None:
    assert liveness_of({"executor": "newer", "job": 1}) is Liveness.CANNOT_BE_ASKED
    assert liveness_of({"executor": "elsewhere", "job": 7}) is Liveness.CANNOT_BE_ASKED
    assert liveness_of(executor_named("local").owner()) is Liveness.LIVES
    assert liveness_of({"host": "of-somebody-else", "pid": os.getpid()}) is Liveness.CANNOT_BE_ASKED
    with pytest.raises(ValueError, match="does not name a process"):
        liveness_of({"host": 1, "pid": "x"})


@pytest.mark.parametrize(
    ("known", "groups"), [(Liveness.LIVES, []), (Liveness.CANNOT_BE_ASKED, [[3, 4]]), (Liveness.DEAD, [[3, 4]])]
)
def test_a_batch_in_hand_is_its_executors(
    tmp_path: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, known: Liveness, groups: list[list[int]]
) -> None:
    monkeypatch.setenv(base.EXECUTOR, "elsewhere")
    InHand(tmp_path / "batch.json").begin("a", [3, 4])
    data = json.loads((tmp_path / "batch.json").read_text())
    assert (data["executor"], data["job"]) == ("elsewhere", 7)
    elsewhere.known = known
    assert InHand(tmp_path / "batch.json").groups("a") == groups


class Scripted:
    """A submission that says what a test has written down; an exception is raised."""

    def __init__(self, *news: list[Reported | Ended] | BaseException) -> None:
        self._news: Iterator[list[Reported | Ended] | BaseException] = iter(news)
        self.done: list[str] = []

    def poll(self) -> list[Reported | Ended]:
        news = next(self._news)
        if isinstance(news, BaseException):
            raise news
        return news

    def cancel(self) -> None:
        self.done.append("cancel")

    def kill(self) -> None:
        self.done.append("kill")


def test_a_submission_is_polled_until_every_task_has_ended() -> None:
    """A poll may bring nothing, or several tasks' news at once; a task ends when it does."""
    told: list[tuple[int, int, int]] = []
    first, last = Ended(0, -signal.SIGKILL, 2), Ended(1, 0, 0)
    script = Scripted([], [Reported(1, 5, 1), last, Reported(0, 2, 0)], [], [first])
    assert run_to_end(script, 2, lambda *report: told.append(report)) == [first, last]
    assert (told, script.done) == ([(1, 5, 1), (0, 2, 0)], [])


@pytest.mark.parametrize(("error", "done"), [(KeyboardInterrupt(), "cancel"), (OSError("no more processes"), "kill")])
def test_tasks_do_not_go_on_without_their_run(error: BaseException, done: str) -> None:
    script = Scripted([Ended(0, 0, 0)], error)
    with pytest.raises(type(error)):
        run_to_end(script, 2)
    assert script.done == [done]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (base.progress_line(5, 2), Reported(3, 5, 2)),
        (base.error_line({"class": "StageError", "what": "it"}), {"class": "StageError", "what": "it"}),
        ("something that a stage printed", None),
        ('{"done": 5}', None),
        ('["error"]', None),
        ("5", None),
    ],
)
def test_a_line_of_a_task_is_read_as_it_was_written(line: str, said: object) -> None:
    assert base.read_line(3, line) == said
