"""Kills: a small root that a command is killed over, and what must be true of it afterwards.

The pipeline: `note` (a stage of tests/support/stages.py that logs every row that it sees) and `generate` on two thirds
of the rows. `tests/torture.py` drives the harness at the end; tests/test_crash.py uses the rest.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  (pyarrow imports it where it is installed: once, and not in every fork)
import pyarrow as pa
import pyarrow.dataset  # likewise, by read_table
import pyarrow.parquet as pq

from builder.cli import app
from builder.engine import runs, worker
from builder.engine.work import Choice
from builder.executors.by_name import EXECUTORS
from builder.hybrid import splice
from builder.progress import Talk
from builder.store.files import TEMP_SUFFIX, temp_path
from builder.store.layout import Layout, names
from builder.table import column_files, commits, partitions, root_schema
from builder.table.schema import SOURCE
from builder.verbs.gc import collect_garbage
from builder.verbs.plan import make_plan
from builder.verbs.snapshot import Snapshot
from builder.verbs.verify import prove
from conftest import PIPELINE, Workspace, make_shard, samples
from support.faults import HALVES, READS, Fault, Point, arm
from support.in_process import InProcess
from support.planned import SQL, section

BATCH_ROWS = 2
WRITE = """
select shard, row, uid, image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed,
       image_model, image_prompt, note as prompt
from samples where image_path is not null
"""


def make(
    folder: Path,
    *,
    shards: int = 3,
    rows: int = 24,
    workers: int = 2,
    checkpoint_rows: int = 4,
    pause_s: float = 0.04,
    with_other: bool = False,
) -> Workspace:
    """A folder with the shards, the SQL and the pipeline.

    The log's path is relative, since an option is part of `note_inputs`, which must be the same in every folder.
    """
    for i in range(shards):
        make_shard(folder / f"source/{i:08d}.tar", samples(rows, start=i * rows))
    generate = (
        "select shard, row, uid, key, note as prompt, 0 as draw from samples where note is not null and row % 3 > 0"
    )
    for name, sql in {"note": SQL, "generate": generate, "write": WRITE}.items():
        (folder / f"{name}.sql").write_text(sql)
    pace = {"sql": f"{folder}/note.sql", "pause_s": pause_s}
    sections = [
        section("Note", log='"seen.log"', **pace),
        f"[stages.note.run]\nbatch_rows = {BATCH_ROWS}\n",
        f'[stages.generate]\nsql = "{folder}/generate.sql"\nwidth = 32\nheight = 32\n',
        f"[stages.generate.run]\nbatch_rows = {BATCH_ROWS}\n",
        f'[write]\nselect = "{folder}/write.sql"\n',
    ]
    if with_other:
        sections.append(section("Other", name="other", log='"other.log"', **pace))
    text = PIPELINE.format(folder=folder, workers=workers, checkpoint_rows=checkpoint_rows, stages="\n".join(sections))
    (folder / "pipeline.toml").write_text(text)
    return Workspace(folder, folder / "pipeline.toml")


# --- commands as processes ---


def command(made: Workspace, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "builder", *arguments, "--pipeline", str(made.file)]


def start(made: Workspace, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`builder ARGUMENTS` in a session of its own."""
    return subprocess.Popen(
        command(made, *arguments), cwd=made.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, **environment},
    )  # fmt: skip


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
            if f"{made.folder}/" in line and "builder" in line:
                found.add(int(folder.name))
    return found


def seen(made: Workspace, log: str = "seen.log") -> list[str]:
    """The uid of every row that `note` was asked about."""
    path = made.folder / log
    return path.read_text().split() if path.exists() else []


# --- what must be true of a root ---


@dataclass
class End:
    """A finished root: its table less what may differ, and the bytes of its hybrid shards."""

    table: pa.Table
    shards: dict[str, str]


def _is_same_always(name: str) -> bool:
    """Whether a column is the same whatever runs and attempts made it."""
    is_of_a_run = name.endswith(("_run", "_sample")) or name == "source_changed"
    return not is_of_a_run and name not in ("image_path", "image_offset")


def table_of(made: Workspace) -> pa.Table:
    """The table less the columns that may differ."""
    partitions = pa.concat_tables(pq.read_table(path) for path in sorted((made.root / "samples").glob("*.parquet")))
    return partitions.select([n for n in partitions.column_names if _is_same_always(n)]).replace_schema_metadata(None)


def hashes_of(made: Workspace) -> dict[str, str]:
    """The output's files, less manifests and temp files, and what is in them."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((made.root / "shards").glob("*"))
        if path.is_file() and not path.name.endswith(TEMP_SUFFIX)
    }


def end_of(made: Workspace) -> End:
    return End(table_of(made), hashes_of(made))


def check_same(made: Workspace, reference: End) -> None:
    """The table and the output are those of the reference."""
    found = end_of(made)
    assert found.table.num_rows == reference.table.num_rows
    for name in reference.table.column_names:
        assert found.table[name].equals(reference.table[name]), name
    assert found.table.column_names == reference.table.column_names
    assert found.shards == reference.shards


def check_proven(made: Workspace, edited: int | None = None) -> None:
    """Every hybrid shard is proven, with so many samples edited: two thirds if not said."""
    pipeline = made.load()
    proof = prove(pipeline, Talk(quiet=True))
    assert (proof.problems, proof.shards) == ([], len(pipeline.layout.shard_names()))
    assert proof.edited == (proof.rows * 2 // 3 if edited is None else edited)


def check_swept(layout: Layout, others: Sequence[Path] = ()) -> None:
    """What a sweep leaves: no temp file, generations that are needed, edits tars and runs that rows point to.

    Args:
        others: files that are nobody's to sweep.
    """
    assert {path for path in layout.root.rglob(f"*{TEMP_SUFFIX}") if path not in others} == set()
    needed: set[str] = set()
    pointed: set[str] = set()
    for shard in layout.shard_names():
        _check_generations(layout, shard)
        for stage, generations in column_files.listing(layout, shard).items():
            for generation in generations:
                content = column_files.read_column_file(layout.column_file(shard, stage, generation)).table
                if "image_path" in content.column_names:
                    needed |= set(content["image_path"].to_pylist()) - {None}
            pointed |= set(content[f"{stage}_run"].to_pylist()) - {None}
    tars = {str(path.relative_to(layout.root)) for path in layout.edits.rglob("*.tar")}
    assert tars == needed, (tars ^ needed, tars - needed)
    left = {name for name in names(layout.runs) if layout.run(name) not in others}
    pointed.discard("ingest-run")
    assert left == pointed, (left - pointed, pointed - left)  # the name of an ingest in the test's own process


def _check_generations(layout: Layout, shard: str) -> None:
    """Two of every stage; of the source one more for each identity of rows that a column file of a stage follows."""
    rows = {
        stage: [
            column_files.read_column_file(layout.column_file(shard, stage, generation)).rows
            for generation in generations
        ]
        for stage, generations in column_files.listing(layout, shard).items()
    }
    source = rows.pop(SOURCE)
    for stage, kept in rows.items():
        assert len(kept) <= column_files.KEPT_GENERATIONS, (shard, stage, kept)
    older, newest = source[: -column_files.KEPT_GENERATIONS], source[-column_files.KEPT_GENERATIONS :]
    followed = set(itertools.chain.from_iterable(rows.values()))
    assert len(older) == len(set(older)), (shard, older)
    assert set(older) <= followed - set(newest), (shard, older)


def answers(layout: Layout) -> dict[tuple[str, str, str], list[Any]]:
    """What is committed: the values of every row with a status, by shard, key and stage; heals first."""
    partitions.heal(layout, layout.shard_names())
    _, columns = root_schema.load_schema(layout)
    found: dict[tuple[str, str, str], list[Any]] = {}
    for shard in layout.shard_names():
        partition = pq.read_table(layout.partition(shard))
        keys = partition["key"].to_pylist()
        for stage in {column.stage for column in columns}:
            own = [c.name for c in columns if c.stage == stage and c.name in partition.column_names]
            if f"{stage}_status" not in own:
                continue
            values = [partition[name].to_pylist() for name in own if _is_same_always(name)]
            statuses = partition[f"{stage}_status"].to_pylist()
            for key, status, *row in zip(keys, statuses, *values, strict=True):
                if status is not None:
                    found[shard, key, stage] = row
    return found


# --- the harness: what is killed ---

SHARDS, ROWS, CHECKPOINT_ROWS = 2, 6, 4
#: Kinds of points that are killed at, and those of them that change what others see.
KILLED = ("write", "parquet", "fsync", "link", "rename", "unlink", "mkdir")
NAMING = ("link", "rename", "unlink")
_AGAIN = ("--set", 'stages.note.word="again"')


@dataclass(frozen=True)
class Scene:
    """A command over a prepared root.

    Attributes:
        verb: what is counted: ingest, stage, fold, write, gc.
        before: the commands that prepare the root, then `change` of its files.
        command: what is killed; then run again to its end, then `after`.
        logged: whether `note` sees rows in it, each of them at most once in a run.
        lost: rows that a kill may cost: a checkpoint of each task.
        short: whether the short form has it.
    """

    name: str
    verb: str
    before: tuple[tuple[str, ...], ...]
    command: tuple[str, ...]
    after: tuple[tuple[str, ...], ...] = (("run",),)
    change: Callable[[Workspace], None] = lambda made: None
    logged: bool = False
    lost: int = 2 * CHECKPOINT_ROWS
    short: bool = False


def _reorder(made: Workspace) -> None:
    """The first shard with its samples the other way round: other rows, the same answers."""
    make_shard(made.folder / "source/00000000.tar", samples(ROWS)[::-1])


def _unfold(made: Workspace) -> None:
    """One partition is lost, and one as old as its ingest: a stage's answers are not folded."""
    layout = made.load().layout
    layout.partition("00000000").unlink()
    aside = made.folder / "aside"
    aside.mkdir()
    for path in layout.column_folder("00000001").glob("note.*"):
        path.rename(aside / path.name)
    partitions.fold(layout, "00000001")
    for path in aside.iterdir():
        path.rename(layout.column_folder("00000001") / path.name)


#: A process that never lives: the numbers of others may be given anew while the harness goes on.
NOBODY = 1 << 22


def _litter(made: Workspace) -> None:
    """What dead processes leave: temp files, a closed edits tar whose rows were not committed, a run of nothing."""
    layout = made.load().layout
    for path in (
        layout.column_file("00000000", "note", 9), layout.partition("00000001"), layout.hybrid("00000000"),
        layout.manifest("00000001"), layout.runs / "write.parquet", layout.schema_file(9),
    ):  # fmt: skip
        temp = temp_path(path)
        temp.with_name(temp.name.replace(f"-{os.getpid()}-", f"-{NOBODY}-")).write_bytes(b"half")
    [tar, *_] = sorted(layout.edits.rglob("*.tar"))
    run = runs.describe_new(layout, "generate", "stage", "local", stage="generate", version="1", options_hash="")
    shutil.copy(tar, layout.edits_tar("00000001", f"{run.folder.name}-0a0b0c", 0))


_ALL = (("ingest",), ("stage", "note"), ("stage", "generate"))
_ANEW = (*_ALL, ("write",), ("stage", "note", "--redo", *_AGAIN), ("stage", "generate", "--stale", *_AGAIN))
SCENES = (
    Scene("ingest", "ingest", (), ("ingest",), short=True),
    Scene("ingest of a shard in another order", "ingest", (*_ALL, ("write",)), ("ingest",), change=_reorder),
    Scene("stage note", "stage", _ALL[:1], ("stage", "note"), logged=True),
    Scene("stage generate", "stage", _ALL[:2], ("stage", "generate"), short=True),
    Scene("stage note --redo", "stage", _ALL, _ANEW[4], after=(("run", *_AGAIN),), logged=True),
    Scene("stage generate --stale", "stage", _ANEW[:5], _ANEW[5], after=(("run", *_AGAIN),)),
    Scene("fold", "fold", _ALL[:2], ("fold",), change=_unfold, short=True),
    Scene("write", "write", _ALL, ("write",), short=True),
    Scene("write over older shards", "write", _ANEW, ("write", *_AGAIN), after=(("run", *_AGAIN),)),
    Scene("gc", "gc", _ANEW, ("gc",), after=(("run", *_AGAIN),), change=_litter, short=True),
)


#: Commands whose reads are made to fail once: verify, too, which changes nothing.
READ_SCENES = (*SCENES, Scene("verify", "verify", (*_ALL, ("write",)), ("verify",), short=True))
#: What a disk, a file server or the machine may answer to a read.
HICCUPS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE)


@dataclass
class Held:
    """What a root holds: its answers, the hashes of its output, how many rows `note` was asked about."""

    answers: dict[tuple[str, str, str], list[Any]]
    output: dict[str, str]
    asked: int


@dataclass
class Reference:
    """A scene undisturbed: before its command, after it, and at the end with so many samples edited."""

    before: Held
    there: Held
    end: End
    edited: int


@dataclass(frozen=True)
class Kill:
    """One kill: at a point of a scene, or (without one) at a random moment.

    Attributes:
        number: which of the scene's points; None: a random moment.
        when: `before`, `half`, `after` the call; of a read the name of its error; or who is killed at a random moment:
            `process`, a fork that does the whole command; or on the command line `command`, `all` with its workers,
            `worker` one of these.
    """

    scene: str
    kind: str
    number: int | None
    when: str

    def __str__(self) -> str:
        return f"{self.scene}:{'' if self.number is None else self.number}:{self.when}"


def seeded(kills: Sequence[Kill], count: int, seed: int) -> list[Kill]:
    """So many of the kills, every scene its turn."""
    shuffled = random.Random(seed)
    by_scene: dict[str, list[Kill]] = {}
    for kill in kills:
        by_scene.setdefault(kill.scene, []).append(kill)
    for group in by_scene.values():
        shuffled.shuffle(group)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_scene.values()))
    return [kill for kill in turns if kill is not None][:count]


# --- the harness: forks ---


def do(made: Workspace, *arguments: str) -> int:
    """`builder ARGUMENTS` in this process, tasks and all; its exit code."""
    os.chdir(made.folder)
    EXECUTORS["local"] = partial(InProcess, is_logged=False)
    try:
        app.main.main([*arguments, "--pipeline", str(made.file)])
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("a command ends by SystemExit")


def done(made: Workspace, *arguments: str) -> None:
    """`do` to a good end."""
    code = do(made, *arguments)
    assert code == 0, f"builder {' '.join(arguments)}: exit code {code}"


class Broken(AssertionError):
    """What must be true is not; the text is a traceback."""


def forked(act: Callable[[], Any], log: Path, *, kill_after: float | None = None) -> tuple[int, Any]:
    """Runs `act` in a fork of this process, which has imported all and has no threads: its exit code, what it returned.

    Args:
        log: where it prints.
        kill_after: seconds after which it is killed.

    Raises:
        Broken: it raised.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        with log.open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        try:
            answer = (True, act())
        except BaseException:
            answer = (False, traceback.format_exc())
        sys.stdout.flush()
        sender.send(answer)
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    sender.close()
    process.join(kill_after if kill_after is not None else 120)
    if process.exitcode is None:
        process.kill()
        process.join()
        if kill_after is None:
            raise Broken("it did not end in two minutes")
    try:
        good, value = receiver.recv()
    except EOFError:
        return process.exitcode or 0, None
    finally:
        receiver.close()
    if not good:
        raise Broken(f"{value}\nits last lines:\n{_tail(log)}")
    return process.exitcode or 0, value


def _tail(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-12:])


def _fault_at(made: Workspace, points: list[Point], kill: Kill) -> Fault:
    """A kill at a point, found by its kind, its path and how often it was passed: threads may change the order."""
    assert kill.number is not None
    point = points[kill.number]
    return Fault(
        str(made.root), (point.kind,), f"^{re.escape(point.path)}$", points[: kill.number].count(point), when=kill.when
    )


class Harness:
    """Roots in a folder: prepared once, restored for every kill."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._work, self._saved = folder / "work", folder / "saved"
        self._log, self._journal = folder / "log.txt", folder / "journal.jsonl"
        self._references: dict[str, Reference] = {}
        self._points: dict[str, list[Point]] = {}
        self._reads: dict[str, list[Point]] = {}
        self._seconds: dict[tuple[str, bool], float] = {}
        folder.mkdir(exist_ok=True)
        self._made = make(self._work, shards=SHARDS, rows=ROWS, checkpoint_rows=CHECKPOINT_ROWS, pause_s=0.0)
        _ = Snapshot(self._made.load()).known_columns  # what every fork would import and look up again
        self._others = self._plant()
        self._save("")

    def _plant(self) -> list[Path]:
        """Files in the root that are nobody's to sweep: of a process that lives, of another host, a person's."""
        layout = Layout(self._made.root)
        live = f"{socket.gethostname()}-{os.getpid()}-0123abcd{TEMP_SUFFIX}"
        planted = [
            layout.column_folder("00000000") / f".note.g000009.parquet@{live}",
            layout.edits / f"00000001/.20260101T000000-generate-0000-000000-0.tar@{live}",
            layout.shards / f".00000000.tar@elsewhere-7-0123abcd{TEMP_SUFFIX}",
            layout.shards / "notes.txt",
            layout.root / "notes.txt",
            layout.runs / "notes.txt",
        ]
        for path in planted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("not to be swept")
        return planted

    # --- roots ---

    def _save(self, name: str) -> None:
        for path in self._made.root.glob("runs/*/run.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "pid": NOBODY}))
        shutil.copytree(self._work, self._saved / (name or "new"))

    def _restore(self, name: str) -> None:
        shutil.rmtree(self._work)
        shutil.copytree(self._saved / (name or "new"), self._work)

    def _state(self, commands: tuple[tuple[str, ...], ...]) -> str:
        """The name of the saved root on which these commands were run."""
        if not commands:
            return ""
        name = "after " + "+".join("_".join(words) for words in commands)
        if not (self._saved / name).exists():
            self._restore(self._state(commands[:-1]))
            self._fork(partial(done, self._made, *commands[-1]))
            self._save(name)
        return name

    def _fork(self, act: Callable[[], Any]) -> Any:
        code, value = forked(act, self._log)
        if code:
            raise Broken(f"a process ended with {code}")
        return value

    def points(self, scene: Scene) -> list[Point]:
        """Every point that the scene's command passes; prepares the scene and its reference."""
        if scene.name not in self._points:
            self._restore(self._state(scene.before))
            self._fork(partial(scene.change, self._made))
            self._save(scene.name)
            before = self._fork(self._held)
            self._restore(scene.name)
            began = time.monotonic()
            self._points[scene.name] = self._fork(partial(self._count, scene))
            self._seconds[scene.name, False] = time.monotonic() - began
            there = self._fork(self._held)
            for words in scene.after:
                self._fork(partial(done, self._made, *words))
            self._references[scene.name] = Reference(before, there, *self._fork(self._ended))
        return self._points[scene.name]

    def reads(self, scene: Scene) -> list[Point]:
        """Every point at which the scene's command reads a file of the root or of its sources."""
        if scene.name not in self._reads:
            self.points(scene)
            self._restore(scene.name)
            self._reads[scene.name] = self._fork(partial(self._count, scene, READS, self._work))
        return self._reads[scene.name]

    def hiccups(self, scene: Scene) -> Iterator[Kill]:
        """An error at every read of a scene, each error its turn."""
        for number, point in enumerate(self.reads(scene)):
            yield Kill(scene.name, point.kind, number, errno.errorcode[HICCUPS[number % len(HICCUPS)]])

    def hiccup(self, scene: Scene, kill: Kill) -> None:
        """Lets one read fail once and checks all: no row is failed, nothing is lost, the same command ends it.

        Raises:
            Broken: something that must be true is not.
        """
        points = self.reads(scene)
        assert kill.number is not None
        point = points[kill.number]
        self._restore(scene.name)
        self._journal.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
        nth = points[: kill.number].count(point)
        fault = Fault(
            str(self._work), (point.kind,), f"^{re.escape(point.path)}$", nth, errno=getattr(errno, kill.when)
        )

        def act() -> int:
            arm(fault)
            self._keep_a_journal()
            return do(self._made, *scene.command)

        code = self._fork(act)
        talk = self._log.read_text("utf-8", "replace")
        if code not in (0, 1):
            raise Broken(f"exit code {code}\n{talk}")
        if code == 1 and "run the same command again" not in talk:
            raise Broken(f"it does not say what the machine answered\n{talk}")
        self._fork(self._check_none_failed)
        committed = self._fork(partial(self._look, scene, False))
        self._fork(partial(self._end, scene, committed))
        self._fork(partial(self._sweep, scene))

    def _check_none_failed(self) -> None:
        layout = self._made.load().layout
        partitions.heal(layout, layout.shard_names())
        for path in (layout.root / "samples").glob("*.parquet"):
            partition = pq.read_table(path)
            for name in partition.column_names:
                failed = name.endswith("_status") and "failed" in partition[name].to_pylist()
                assert not failed, f"{path.name}: a row of {name} has failed"

    def _count(self, scene: Scene, kinds: tuple[str, ...] = KILLED, folder: Path | None = None) -> list[Point]:
        fault = Fault(str(folder or self._made.root), kinds, nth=None)
        arm(fault)
        done(self._made, *scene.command)
        return fault.passed

    def _held(self) -> Held:
        layout = self._made.load().layout
        return Held(answers(layout) if layout.shard_names() else {}, hashes_of(self._made), len(seen(self._made)))

    def _ended(self) -> tuple[End, int]:
        """The end, and how many samples are edited."""
        return end_of(self._made), prove(self._made.load(), Talk(quiet=True)).edited

    def kills(self, scene: Scene) -> Iterator[Kill]:
        """A kill before every point of a scene, in the middle of its bytes, and after those that change names.

        After any other call the disk is as it is before the next one.
        """
        for number, point in enumerate(self.points(scene)):
            yield Kill(scene.name, point.kind, number, "before")
            if point.kind in HALVES:
                yield Kill(scene.name, point.kind, number, "half")
            if point.kind in NAMING:
                yield Kill(scene.name, point.kind, number, "after")

    # --- one kill ---

    def kill(self, scene: Scene, kill: Kill) -> bool:
        """Does it and checks all; returns False if the command ended before its random moment.

        Raises:
            Broken: something that must be true is not.
        """
        points = self.points(scene)
        self._restore(scene.name)
        self._journal.unlink(missing_ok=True)
        if kill.when in ("command", "all", "worker"):
            if not self._kill_on_the_command_line(scene, kill.when):
                return False
        elif not self._kill_a_fork(scene, kill, points):
            return False
        sweep_first = self._random.random() < 0.5
        committed = self._fork(partial(self._look, scene, sweep_first))
        self._fork(partial(self._end, scene, committed))
        self._fork(partial(self._sweep, scene))
        return True

    def _kill_a_fork(self, scene: Scene, kill: Kill, points: list[Point]) -> bool:
        def act() -> None:
            if kill.number is not None:
                arm(_fault_at(self._made, points, kill))
            self._keep_a_journal()
            done(self._made, *scene.command)

        moment = self._random.random() * self._seconds[scene.name, False] if kill.number is None else None
        code, _ = forked(act, self._log, kill_after=moment)
        if code == 0 and kill.number is not None:
            raise Broken(f"point {kill.number}, {points[kill.number]}, was not reached")
        return code == -signal.SIGKILL

    def _keep_a_journal(self) -> None:
        """Notes what the engine has been told is committed: that must be there, whatever comes."""
        journal = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def noted(real: Callable[..., Any], fact: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                result = real(*arguments, **options)
                os.write(journal, (json.dumps(fact(result, *arguments)) + "\n").encode())
                return result

            return call

        commits.commit = noted(  # type: ignore[assignment]
            commits.commit,
            lambda result, layout, shard, stage, columns, done, *_: ["rows", shard, stage, done["row"].to_pylist()],
        )
        worker.ingest_shard = noted(  # type: ignore[assignment]
            worker.ingest_shard, lambda result, layout, source, shard, *_: ["shard", shard]
        )
        splice.write_shard = noted(  # type: ignore[assignment]
            splice.write_shard, lambda result, layout, plan: ["output", plan.shard]
        )

    def _kill_on_the_command_line(self, scene: Scene, who: str) -> bool:
        if (scene.name, True) not in self._seconds:
            began = time.monotonic()
            _, talk = start(self._made, *scene.command).communicate(timeout=120)
            self._seconds[scene.name, True] = time.monotonic() - began
            self._restore(scene.name)
        process = start(self._made, *scene.command)
        try:
            process.communicate(timeout=0.2 + self._random.random() * (self._seconds[scene.name, True] - 0.2))
        except subprocess.TimeoutExpired:
            alive = processes(self._made)
            workers = sorted(alive - {process.pid})
            if who == "worker" and workers:
                os.kill(workers[0], signal.SIGKILL)
                _, talk = process.communicate(timeout=120)
                if process.returncode != 0:
                    raise Broken(f"after the death of a worker: exit code {process.returncode}\n{talk}") from None
                return True
            for pid in alive if who == "all" else {process.pid}:
                os.kill(pid, signal.SIGKILL)
            process.communicate()
            wait_for(lambda: not processes(self._made), 10)  # workers die with their parent
            return True
        return False

    # --- what must be true ---

    def _look(self, scene: Scene, sweep_first: bool) -> set[str]:
        """Right after the kill: nothing committed is lost, nothing is half under its name; returns uids with a note."""
        reference, layout = self._references[scene.name], self._made.load().layout
        before, there = reference.before, reference.there
        for name, found in hashes_of(self._made).items():
            if name != layout.sizes().name:
                assert found in (before.output.get(name), there.output.get(name)), f"{name} is neither old nor new"
        make_plan(self._made.load(), Choice())  # whatever was left behind, what there is to do can be said
        now = self._check_kept(layout, before.answers, there.answers)
        if sweep_first:
            done(self._made, "gc")
            assert self._check_kept(layout, before.answers, there.answers) == now
        noted = {key.split("-")[0] for (_, key, stage), found in now.items() if stage == "note"}
        if scene.logged:
            asked = seen(self._made)[before.asked :]
            assert len(asked) == len(set(asked)), "a row was asked twice"
            if "--redo" not in scene.command:
                assert len(set(asked) - noted) <= scene.lost, "more than a checkpoint is lost"
        return noted

    def _check_kept(self, layout: Layout, before: dict[Any, Any], there: dict[Any, Any]) -> dict[Any, Any]:
        """What was answered before is, as it was or as the command answers it; what was told committed is."""
        now = answers(layout)
        for place, answer in before.items():
            assert place in now, f"{place} is lost"
            assert now[place] in (answer, there[place]), f"{place} is {now[place]}"
        for place, answer in now.items():
            assert answer in (before.get(place), there[place]), f"{place} is {answer}"
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        for kind, shard, *rest in map(json.loads, lines):
            if kind == "output":
                assert layout.manifest(shard).exists(), f"the output of shard {shard} was written and is lost"
                continue
            stage, rows = rest or ("source", range(ROWS))
            keys = partitions.read_partition(layout, shard, ["key"])[0]["key"].to_pylist()
            for place in ((shard, keys[row], stage) for row in rows):
                assert now.get(place) == there[place], f"{place} was committed and is lost"
        return now

    def _end(self, scene: Scene, noted: set[str]) -> None:
        """The same command again asks about what was not committed and nothing else; then to the end."""
        asked = len(seen(self._made))
        done(self._made, *scene.command)
        if scene.logged:
            again = seen(self._made)[asked:]
            everything = {f"{i:032x}" for i in range(SHARDS * ROWS)}
            assert sorted(again) == sorted(everything if "--redo" in scene.command else everything - noted)
        for words in scene.after:
            done(self._made, *words)

    def _sweep(self, scene: Scene) -> None:
        """The end is the reference's; a sweep deletes what is dead and nothing else."""
        reference, pipeline = self._references[scene.name], self._made.load()
        check_same(self._made, reference.end)
        would = collect_garbage(pipeline, Talk(quiet=True), dry_run=True).paths
        assert all(path.exists() for path in would)
        swept = collect_garbage(pipeline, Talk(quiet=True), dry_run=False).paths
        assert set(would) <= set(swept)
        assert not any(path.exists() for path in swept)
        check_swept(pipeline.layout, self._others)
        assert [path for path in self._others if not path.exists()] == []
        check_same(self._made, reference.end)
        check_proven(self._made, reference.edited)
        assert collect_garbage(pipeline, Talk(quiet=True), dry_run=True).paths == []
