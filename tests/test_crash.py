"""Kills at any moment, live copies, two stages at once: what was committed is there, and the end is the same.

The pipeline: `note` (a stage of tests/stages.py that logs every row that it sees) and `generate` on two thirds of the
rows, three shards of 24 samples, two workers, checkpoints of four rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder import pipeline as pipelines
from builder import table
from builder.layout import Layout, RunFiles, names
from builder.progress import Talk
from builder.workset import Choice
from conftest import PIPELINE, Workspace, ingest_here, make_shard, samples
from planned import SQL, described, section

SHARDS, ROWS = 3, 24
WORKERS, CHECKPOINT_ROWS, BATCH_ROWS = 2, 4, 2
ALL = [f"{i:032x}" for i in range(SHARDS * ROWS)]
WRITE = """
select shard, row, uid, image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed,
       image_model, image_prompt, note as prompt
from samples where image_path is not null
"""


def make(folder: Path, *, with_other: bool = False) -> Workspace:
    """A folder with the shards, the SQL and the pipeline.

    The log's path is relative, since an option is part of `note_inputs`, which must be the same in every folder.
    """
    for i in range(SHARDS):
        make_shard(folder / f"source/{i:08d}.tar", samples(ROWS, start=i * ROWS))
    generate = "select shard, row, uid, key, note as prompt from samples where note is not null and row % 3 > 0"
    for name, sql in {"note": SQL, "generate": generate, "write": WRITE}.items():
        (folder / f"{name}.sql").write_text(sql)
    pace = {"sql": f"{folder}/note.sql", "pause_s": 0.04}
    sections = [
        section("Note", log='"seen.log"', **pace),
        f"[stages.note.run]\nbatch_rows = {BATCH_ROWS}\n",
        f'[stages.generate]\nsql = "{folder}/generate.sql"\nwidth = 32\nheight = 32\n',
        f"[stages.generate.run]\nbatch_rows = {BATCH_ROWS}\n",
        f'[write]\nselect = "{folder}/write.sql"\n',
    ]
    if with_other:
        sections.append(section("Other", name="other", log='"other.log"', **pace))
    text = PIPELINE.format(folder=folder, workers=WORKERS, checkpoint_rows=CHECKPOINT_ROWS, stages="\n".join(sections))
    (folder / "pipeline.toml").write_text(text)
    return Workspace(folder, folder / "pipeline.toml")


def command(made: Workspace, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "builder", *arguments, "--pipeline", str(made.file)]


def start(made: Workspace, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`builder ARGUMENTS` in a session of its own."""
    return subprocess.Popen(
        command(made, *arguments), cwd=made.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, **environment},
    )  # fmt: skip


def run(made: Workspace, *arguments: str) -> list[str]:
    """`builder ARGUMENTS` to a good end; its talk."""
    return made.run(*arguments, cwd=made.folder).stderr.splitlines()


def seen(made: Workspace, log: str = "seen.log") -> list[str]:
    path = made.folder / log
    return path.read_text().split() if path.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes(made: Workspace) -> set[int]:
    """Living processes whose command line names this folder: the command and its workers."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if str(made.folder) in line and "builder" in line:
                found.add(int(folder.name))
    return found


# --- what must be the same ---


@dataclass
class End:
    """A finished root: its table less what may differ, and the bytes of its hybrid shards."""

    table: pa.Table
    shards: dict[str, str]


def table_of(made: Workspace) -> pa.Table:
    """The table less the columns that may differ."""
    partitions = pa.concat_tables(pq.read_table(path) for path in sorted((made.root / "samples").glob("*.parquet")))
    same = [
        name for name in partitions.column_names
        if not name.endswith("_run") and name not in ("image_path", "image_offset")
    ]  # fmt: skip
    return partitions.select(same).replace_schema_metadata(None)


def end_of(made: Workspace) -> End:
    shards = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((made.root / "shards").iterdir())
        if path.is_file() and not path.name.endswith(".tmp")
    }
    return End(table_of(made), shards)


def check_same(made: Workspace, reference: End) -> None:
    found = end_of(made)
    assert found.table.num_rows == SHARDS * ROWS
    for name in reference.table.column_names:
        assert found.table[name].equals(reference.table[name]), name
    assert found.table.column_names == reference.table.column_names
    assert found.shards == reference.shards


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[End, float]:
    """What an undisturbed run makes, and how long it takes."""
    made = make(tmp_path_factory.mktemp("reference"))
    began = time.monotonic()
    run(made, "run")
    seconds = time.monotonic() - began
    found = end_of(made)
    assert sorted(found.shards) == [
        "00000000.tar", "00000000_stats.json", "00000001.tar", "00000001_stats.json", "00000002.tar",
        "00000002_stats.json", "sizes.json",
    ]  # fmt: skip
    assert found.table["image_sha256"].null_count == SHARDS * ROWS // 3
    assert sorted(seen(made)) == ALL
    return found, seconds


def check_proven(made: Workspace) -> None:
    proof = pipelines.prove(made.load(), Talk(quiet=True))
    assert (proof.problems, proof.shards, proof.edited) == ([], SHARDS, SHARDS * ROWS * 2 // 3)


def check_lost(made: Workspace, before: int, limit: int) -> None:
    """Of the rows that `process` has seen since line `before` of the log, all but a few are committed."""
    layout = made.load().layout
    done = set()
    for i, shard in enumerate(f"{i:08d}" for i in range(SHARDS)):
        if generation := table.newest(layout, shard).get("note"):
            content = table.read_column_file(layout.column_file(shard, "note", generation), ["note_status"])
            done |= {
                ALL[i * ROWS + row] for row, status in enumerate(content.table["note_status"].to_pylist()) if status
            }
    run = seen(made)[before:]
    assert len(run) == len(set(run))
    assert len(set(run) - done) <= limit


# --- kills at random moments ---


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_at_random_moments(tmp_path: Path, reference: tuple[End, float], seed: int) -> None:
    """Five kills a seed, of the command alone or of all its processes at once.

    A root that comes to its end before the five are through is checked, and another begun.
    """
    end, seconds = reference
    moments = random.Random(seed)
    kills = roots = 0
    while kills < 5 or roots == 0:
        made = make(tmp_path / str(roots))
        before = 0
        while not finished(made, 0.3 + moments.random() * min(seconds, 6.0) if kills < 5 else 120.0, kills % 2 == 0):
            check_lost(made, before, WORKERS * CHECKPOINT_ROWS)
            before = len(seen(made))
            kills += 1
        roots += 1
        check_same(made, end)
        check_proven(made)
        assert set(seen(made)) == set(ALL)


def finished(made: Workspace, seconds: float, whole: bool) -> bool:
    """Runs the pipeline for so long and kills it, `whole` with its workers; returns whether it ended before."""
    process = start(made, "run")
    try:
        _, talk = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in processes(made) if whole else {process.pid}:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        wait_for(lambda: not processes(made), 10)  # workers die with their parent
        return False
    assert process.returncode == 0, talk
    return True


# --- kills at the moments that matter ---

#: Imported by every Python that is started with this folder in PYTHONPATH: once, when a file gets a name that matches
#: KILL_AT, before or after it, the process and the command that started it are killed.
KILLER = """
import os, re, signal

def arm(name):
    real = getattr(os, name)
    when, _, pattern = os.environ["KILL_AT"].partition(" ")
    def act(source, target, **options):
        hit = re.search(pattern, os.fspath(target))
        if hit and when == "before":
            kill()
        real(source, target, **options)
        if hit:
            kill()
    setattr(os, name, act)

def kill():
    if os.environ.get("BUILDER_PARENT_PIPE") == "1":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

if "KILL_AT" in os.environ:
    arm("link")
    arm("replace")
"""
MOMENTS = [
    "before columns/00000001/source.g000001",  # a column file without its name, a shard without rows
    "after columns/00000002/source.g000001",  # a column file that is not folded
    "before runs/[^/]*-note-[^/]*/tasks/00000.json",  # after ingest; a work set that is not cut
    "before columns/00000000/note.g000002",  # inside a checkpoint
    "before samples/00000000",  # inside the fold at a shard's end
    "after samples/00000001",  # a partition whose writer has not looked whether it is behind
    "before runs/[^/]*-generate-[^/]*/workset.parquet",  # after note; a run without a work set
    "before edits/00000000/.*-1.tar",  # inside an edits tar
    "after edits/00000001/.*-0.tar",  # a closed edits tar whose rows are not committed
    "after runs/[^/]*-write-[^/]*/run.json",  # after generate
    "before shards/00000000.tar",  # inside a hybrid shard
    "after shards/00000001.tar",  # a hybrid shard without stats and manifest
    "before shards/manifest/00000002",  # without its manifest
]


def committed(layout: Layout) -> dict[str, int]:
    """Rows with an answer, by stage, as the column files say."""
    found: dict[str, int] = {}
    for shard in names(layout.columns):
        for stage, generation in table.newest(layout, shard).items():
            content = table.read_column_file(layout.column_file(shard, stage, generation), [f"{stage}_status"])
            statuses = content.table[f"{stage}_status"].to_pylist()
            found[stage] = found.get(stage, 0) + statuses.count("ok")
    return found


def check_swept(layout: Layout) -> None:
    """What a sweep leaves: no temp file, two generations, edits tars and runs that rows point to."""
    assert list(layout.root.rglob("*.tmp")) == []
    needed: set[str] = set()
    runs: set[str] = set()
    for shard in layout.shard_names():
        for stage, generations in table.listing(layout, shard).items():
            assert len(generations) <= 2
            for generation in generations:
                content = table.read_column_file(layout.column_file(shard, stage, generation)).table
                if stage == "generate":
                    needed |= set(content["image_path"].to_pylist()) - {None}
            runs |= set(content[f"{stage}_run"].to_pylist()) - {None}
    tars = {str(path.relative_to(layout.root)) for path in layout.edits.rglob("*.tar")}
    assert tars == needed
    assert set(names(layout.runs)) == runs - {"ingest-run"}  # the name of an ingest in the test's own process


def test_kills_at_the_moments_that_matter(tmp_path: Path, reference: tuple[End, float]) -> None:
    """One root, killed again and again as it gets on; then a run to the end, and a sweep."""
    made = make(tmp_path)
    layout = made.load().layout
    (tmp_path / "killer").mkdir()
    path = os.pathsep.join([f"{tmp_path}/killer", *filter(None, [os.environ.get("PYTHONPATH")])])
    (tmp_path / "killer/sitecustomize.py").write_text(KILLER)
    before: dict[str, int] = {}
    lines = 0
    one = ("--set", "run.workers=1")  # so that the moments come in this order
    for moment in MOMENTS:
        process = start(made, "run", *one, KILL_AT=moment, PYTHONPATH=path)
        _, talk = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, (moment, talk)
        wait_for(lambda: not processes(made), 10)
        check_lost(made, lines, CHECKPOINT_ROWS)
        lines = len(seen(made))
        now = committed(layout)
        assert all(now.get(stage, 0) >= rows for stage, rows in before.items()), moment
        before = now
        pipelines.plan(made.load(), Choice())  # whatever was left behind, what there is to do can be said
    left = {path.name.split("@")[0] for path in layout.root.rglob("*.tmp")}
    assert left >= {
        ".source.g000001.parquet", ".note.g000002.parquet", ".00000000.parquet", ".00000.json",
        ".workset.parquet", ".write.parquet", ".00000000.tar", ".00000002.parquet",
    }  # fmt: skip
    assert any(name.startswith(".20") for name in left)  # an edits tar
    assert finished(made, 120.0, False)
    check_same(made, reference[0])
    check_proven(made)
    would = pipelines.gc(made.load(), Talk(quiet=True), dry_run=True).paths
    assert all(path.exists() for path in would)
    swept = pipelines.gc(made.load(), Talk(quiet=True), dry_run=False).paths
    assert set(would) <= set(swept)
    assert not any(path.exists() for path in swept)
    check_swept(layout)
    check_same(made, reference[0])
    check_proven(made)
    assert pipelines.gc(made.load(), Talk(quiet=True), dry_run=False).paths == []
    assert run(made, "run") == [
        "ingest: nothing to do (3 shards)",
        "note: nothing to do (72 ok, 0 failed of 72 covered)",
        "generate: nothing to do (48 ok, 0 failed of 48 covered)",
        "write: nothing to do (3 hybrid shards up to date)",
    ]


# --- at once ---


def test_two_stages_at_once_on_the_same_shards(tmp_path: Path) -> None:
    made = make(tmp_path, with_other=True)
    run(made, "ingest")
    both = [start(made, "stage", name) for name in ("note", "other")]
    for process in both:
        _, talk = process.communicate(timeout=120)
        assert process.returncode == 0, talk
    assert made.rows(
        "select count(*), count(*) filter (note = 'seen: ' || caption), count(*) filter (remark = 'seen: ' || caption),"
        " count(distinct note_run), count(distinct other_run) from samples"
    ) == [(72, 72, 72, 1, 1)]
    assert sorted(seen(made)) == sorted(seen(made, "other.log")) == ALL
    assert not any(table.is_behind(made.load().layout, shard) for shard in made.load().layout.shard_names())


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
    stop_after(late, lambda: table.newest(layout, "00000000").get("note", 0) >= 2, random.random() * 0.1)
    assert other.wait(120) == 0
    assert made.rows("select count(*) from samples where note = 'seen: ' || caption") == [(72,)]
    if redo:
        run(made, "stage", "note", "--redo", "--set", 'stages.note.word="again"', "--set", "stages.note.pause_s=0")
    before = table_of(made), table.newest(layout, "00000001")
    late.send_signal(signal.SIGCONT)
    assert late.wait(120) == 0, late.communicate()
    word = "again" if redo else "seen"
    assert made.rows(f"select count(*), count(distinct note_run) from samples where note = '{word}: ' || caption") == [
        (72, 1)
    ]
    assert table_of(made).equals(before[0])
    assert table.newest(layout, "00000001") == before[1]  # the copy that woke late created no generation
    result = json.loads(planned.result(0).read_text())
    assert (result["ok"], result["dropped"]) == ((0, 72) if redo else (72, 0))


def test_a_copy_that_a_sweep_found_asleep_undoes_nothing(tmp_path: Path, copies: Any) -> None:
    """It sleeps while it generates; the other copy ends, a sweep deletes what is not needed, then it wakes."""
    made = make(tmp_path)
    ingest_here(made.load())
    run(made, "stage", "note", "--set", "stages.note.pause_s=0")
    pipeline = made.load()
    layout = pipeline.layout
    planned = described(pipeline, "generate", Choice(), 1)
    late, other = copies(planned)
    stop_after(late, lambda: table.newest(layout, "00000000").get("generate", 0) >= 1, 0)
    while not (temps := list(layout.edits.rglob(f"*-{late.pid}-*.tmp"))):  # until it sleeps with a tar in hand
        late.send_signal(signal.SIGCONT)
        stop_after(late, lambda: True, 0.003)
    assert other.wait(120) == 0
    pipelines.gc(made.load(), Talk(quiet=True), dry_run=False)
    assert list(layout.edits.rglob("*.tmp")) == temps
    run(made, "write")
    before = table_of(made)
    late.send_signal(signal.SIGCONT)
    assert late.wait(120) == 0, late.communicate()
    assert table_of(made).equals(before)
    check_proven(made)
    pipelines.gc(made.load(), Talk(quiet=True), dry_run=False)
    check_proven(made)
    check_swept(layout)
    assert made.rows("select distinct generate_run from samples where image_path is not null") == [
        (planned.folder.name,)
    ]
