"""Kills at any moment, live copies, two stages at once: what was committed is there, and the end is the same.

The kills are a sample of those of `make torture`. The roots of the rest: three shards of 24 samples, `note` (a stage of
tests/support/stages.py that logs every row that it sees) and `generate`, two workers, checkpoints of four rows.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.engine.work import Choice
from builder.progress import Talk
from builder.store.layout import RunFiles
from builder.table import column_files, partitions
from builder.verbs.gc import collect_garbage
from conftest import ingest_here
from support.kills import NOBODY, check_proven, check_swept, make, seen, start, table_of, wait_for
from support.planned import described

ALL = [f"{i:032x}" for i in range(3 * 24)]
TORTURE = Path(__file__).with_name("torture.py")


def test_a_sample_of_the_kills_of_make_torture() -> None:
    """Every verb is killed, at points at which it touches the disk and on the command line with its workers.

    A read of each, and of verify, is answered with an error.
    """
    command = [sys.executable, str(TORTURE), "--sample", "10", "--seed", "1", "--lanes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines()[:8]]
    assert (head[:2], head[-1]) == (["killed", "in"], "total")
    assert {"command", "read"} <= {*head}
    assert [row[0] for row in rows] == ["ingest", "stage", "fold", "write", "gc", "verify", "total"]
    assert all(int(row[-1]) > 0 for row in rows)
    assert rows[-1][-1] == "16"
    assert re.match(r"16 kills and errors in \d+ s, seed 1\. After each: ", done.stdout.splitlines()[8])


def test_a_sweep_knows_a_run_from_what_a_person_keeps_beside_it(tmp_path: Path) -> None:
    """A run has its description as long as its name: one that was killed before is a dead temp folder."""
    made = make(tmp_path, shards=1, rows=3)
    ingest_here(made.load())
    runs = made.load().layout.runs
    dead, lives = (
        f".20260101T000000-note-0000@{socket.gethostname()}-{pid}-0123abcd.tmp" for pid in (NOBODY, os.getpid())
    )
    for name in (dead, lives, "20260101T000000-note-0001", "mine"):
        (runs / name).mkdir(parents=True)
    (runs / dead / "run.json").write_text("{")
    (runs / "20260101T000000-note-0001/run.json").write_text(json.dumps({"host": socket.gethostname(), "pid": NOBODY}))
    (runs / "notes.txt").write_text("a file")
    swept = collect_garbage(made.load(), Talk(quiet=True), dry_run=False).paths
    assert sorted(path.name for path in swept) == sorted([dead, "20260101T000000-note-0001"])
    assert sorted(path.name for path in runs.iterdir()) == sorted([lives, "mine", "notes.txt"])


# --- at once ---


def test_two_stages_at_once_on_the_same_shards(tmp_path: Path) -> None:
    made = make(tmp_path, with_other=True)
    ingest_here(made.load())
    both = [start(made, "stage", name) for name in ("note", "other")]
    for process in both:
        _, talk = process.communicate(timeout=120)
        assert process.returncode == 0, talk
    assert made.rows(
        "select count(*), count(*) filter (note = 'seen: ' || caption), count(*) filter (remark = 'seen: ' || caption),"
        " count(distinct note_run), count(distinct other_run) from samples"
    ) == [(72, 72, 72, 1, 1)]
    assert sorted(seen(made)) == sorted(seen(made, "other.log")) == ALL
    assert not any(partitions.is_behind(made.load().layout, shard) for shard in made.load().layout.shard_names())


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[Callable[[RunFiles], list[subprocess.Popen[str]]]]:
    """Starts two live copies of task 0 of a run; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start_copies(run: RunFiles) -> list[subprocess.Popen[str]]:
        for _ in range(2):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "builder", "task", str(run.folder), "0"], cwd=tmp_path,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        return started

    yield start_copies
    for process in started:
        process.kill()
        process.wait()


def stop_after(process: subprocess.Popen[str], condition: Callable[[], object], seconds: float) -> None:
    """Stops a copy in the middle, at a moment that differs from run to run."""
    wait_for(condition)
    time.sleep(seconds)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None


@pytest.mark.parametrize("redo", [False, True])
def test_a_live_copy_that_wakes_late_undoes_nothing(tmp_path: Path, copies: Any, redo: bool) -> None:
    made = make(tmp_path)
    ingest_here(made.load())
    pipeline = made.load()
    layout = pipeline.layout
    planned = described(pipeline, "note", Choice(), 1)
    late, other = copies(planned)
    stop_after(late, lambda: column_files.newest(layout, "00000000").get("note", 0) >= 2, random.random() * 0.1)
    assert other.wait(120) == 0
    assert made.rows("select count(*) from samples where note = 'seen: ' || caption") == [(72,)]
    if redo:
        sets = ("--set", 'stages.note.word="again"', "--set", "stages.note.pause_s=0")
        made.run("stage", "note", "--redo", *sets, cwd=made.folder)
    before = table_of(made), column_files.newest(layout, "00000001")
    late.send_signal(signal.SIGCONT)
    assert late.wait(120) == 0, late.communicate()
    word = "again" if redo else "seen"
    assert made.rows(f"select count(*), count(distinct note_run) from samples where note = '{word}: ' || caption") == [
        (72, 1)
    ]
    assert table_of(made).equals(before[0])
    assert column_files.newest(layout, "00000001") == before[1]  # the copy that woke late created no generation
    result = json.loads(planned.result(0).read_text())
    assert (result["ok"], result["dropped"]) == ((0, 72) if redo else (72, 0))


def test_a_copy_that_a_sweep_found_asleep_undoes_nothing(tmp_path: Path, copies: Any) -> None:
    """It sleeps while it generates; the other copy ends, a sweep deletes what is not needed, then it wakes."""
    made = make(tmp_path)
    ingest_here(made.load())
    made.process("stage", "note", "--set", "stages.note.pause_s=0", cwd=made.folder)
    pipeline = made.load()
    layout = pipeline.layout
    planned = described(pipeline, "generate", Choice(), 1)
    late, other = copies(planned)
    other.send_signal(signal.SIGSTOP)  # it would leave nothing to the first one
    stop_after(late, lambda: column_files.newest(layout, "00000000").get("generate", 0) >= 1, 0)
    while not (temps := list(layout.edits.rglob(f"*-{late.pid}-*.tmp"))):  # until it sleeps with a tar in hand
        late.send_signal(signal.SIGCONT)
        stop_after(late, lambda: True, 0.003)
    other.send_signal(signal.SIGCONT)
    assert other.wait(120) == 0
    collect_garbage(made.load(), Talk(quiet=True), dry_run=False)
    assert list(layout.edits.rglob("*.tmp")) == temps
    made.process("write", cwd=made.folder)
    before = table_of(made)
    late.send_signal(signal.SIGCONT)
    assert late.wait(120) == 0, late.communicate()
    assert table_of(made).equals(before)
    check_proven(made)
    collect_garbage(made.load(), Talk(quiet=True), dry_run=False)
    check_proven(made)
    check_swept(layout)
    assert made.rows("select distinct generate_run from samples where image_path is not null") == [
        (planned.folder.name,)
    ]
