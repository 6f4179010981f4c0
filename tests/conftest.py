"""What the tests share: tiny real tars, a dataset of two of them, and the command line as a process."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from builder.engine import worker
from builder.executors.base import take_task_defaults
from builder.executors.by_name import EXECUTORS
from builder.sources.ingest import ingest_shard
from builder.table import root_schema
from builder.table.schema import BOXES
from builder.table.sql_text import Sql
from builder.verbs.pipeline import Pipeline, load_pipeline
from builder.verbs.snapshot import Snapshot
from builder.verbs.sql import answer
from support.here import builder_here

take_task_defaults()  # before a library counts its threads
#: A file system in memory, and the bytes that it must have free to hold the folders of tests.
_MEMORY, _MEMORY_NEEDED = Path("/dev/shm"), 4 << 30


def _folders_of_tests_in_memory() -> None:
    """Puts `tmp_path` into memory, where there is enough: a third of the suite would wait for fsync otherwise.

    No test needs a disk: durable writes are recorded, and faults of disks are made by `support.faults`. `make torture`
    kills on the real one. `PYTEST_DEBUG_TEMPROOT=/tmp` keeps the folders on disk.
    """
    if _MEMORY.is_mount() and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _MEMORY_NEEDED:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


_folders_of_tests_in_memory()
STAGES = Path(__file__).parent / "support/stages.py"
#: mtime of the test tars' members; the fraction makes tarfile write a pax header for each, as webdataset's writer does.
PAX_MTIME, USTAR_MTIME = 1_700_000_000.5, 1_700_000_000

#: Of tests that start Python under a locale that knows ASCII alone.
starts_in_ascii = pytest.mark.skipif(
    not f"{sys.executable}{__file__}".isascii(),
    reason="under such a locale Python itself does not start from this path",
)


@lru_cache
def picture(seed: int = 0, *, extension: str = "jpg", width: int = 48, height: int = 32) -> bytes:
    """A small picture without a face."""
    noise = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height))
    image.save(out, {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return out.getvalue()


#: Caption of the samples of `members_like`.
CAPTION = "a man with a hat is standing in the street"


def members_like(
    key: str, *extensions: str, number: int = 0, fields: dict[str, Any] | None = None
) -> list[tuple[str, bytes]]:
    """The members of one sample, by their extensions; a picture without a face in each of the formats."""
    made: list[tuple[str, bytes]] = []
    for place, extension in enumerate(extensions):
        last = extension.lower().rpartition(".")[2]
        if last == "json":
            data = json.dumps({"uid": f"{number:032x}", "caption": CAPTION, "width": 48, **(fields or {})}).encode()
        elif last in ("txt", "cls"):
            data = CAPTION.encode() if last == "txt" else b"7"
        else:
            data = picture(10 * number + place, extension=last if last in ("png", "webp") else "jpg")
        made.append((f"{key}.{extension}", data))
    return made


@dataclass
class Sample:
    """One sample of a test shard; None leaves a member or a json field out."""

    key: str
    caption: str | None = "a man with a hat is standing in the street"
    image: bytes | None = field(default_factory=picture)
    extension: str = "jpg"
    fields: dict[str, Any] = field(default_factory=dict)
    txt: bytes | None = None
    json: bytes | None = None

    def members(self) -> list[tuple[str, bytes]]:
        found: list[tuple[str, bytes]] = []
        if self.image is not None:
            found.append((f"{self.key}.{self.extension}", self.image))
        found.append((f"{self.key}.json", self.json if self.json is not None else self.body()))
        text = self.txt if self.txt is not None else (self.caption or "").encode()
        return [*found, (f"{self.key}.txt", text)]

    def body(self) -> bytes:
        fields = {
            "uid": self.key.split("/")[-1].split("-")[0], "caption": self.caption, "url": "https://example.org/a.jpg",
            "key": "000000001", "status": "success", "error_message": None, "width": 48, "height": 32,
            "original_width": 480, "original_height": 320, "exif": '{"a": 1}', "sha256": "0" * 64,
        }  # fmt: skip
        return json.dumps({**fields, **self.fields}, indent=4).encode()


def samples(count: int, *, start: int = 0, boxes: bool = True) -> list[Sample]:
    """Samples with English captions and, with `boxes`, one face each but for every third."""
    made = []
    for i in range(start, start + count):
        faces = [[0.1, 0.1, 0.5, 0.9]] if i % 3 else []
        caption = f"a man with a hat is standing in the street number {i}"
        key = f"{i:032x}-0"
        made.append(Sample(key, caption, picture(i), fields={"face_bboxes": faces} if boxes else {}))
    return made


def write_tar(
    path: Path,
    members: Iterable[tuple[str, bytes]],
    *,
    form: int = tarfile.PAX_FORMAT,
    mtime: float = PAX_MTIME,
    records: Mapping[str, str] | None = None,
) -> Path:
    """Writes a tar of members in this order, mode 0444, owner bigdata, as the field's writers do.

    Args:
        records: more pax records of the last sample's members.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    members = list(members)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
            info.mtime = mtime  # type: ignore[assignment]
            if records and name.partition(".")[0] == members[-1][0].partition(".")[0]:
                info.pax_headers = dict(records)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_shard(path: Path, made: Sequence[Sample], **options: Any) -> Path:
    """Writes a shard of samples."""
    return write_tar(path, [member for sample in made for member in sample.members()], **options)


def read_tar(path: Path) -> dict[str, bytes]:
    """Every regular member's bytes, by Python's tarfile."""
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive if info.isreg()}  # type: ignore[union-attr]


def metadata(path: Path, boxes: dict[str, Any] | Sequence[tuple[str, Any]], *, name: str = "face_bboxes") -> Path:
    """A parquet file as DataComp's: uid, url and boxes."""
    pairs = list(boxes.items()) if isinstance(boxes, dict) else list(boxes)
    columns = {
        "uid": pa.array([uid for uid, _ in pairs], pa.string()),
        "url": pa.array(["https://example.org/a.jpg"] * len(pairs)),
        name: pa.array([found for _, found in pairs], BOXES),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


PIPELINE = """\
[dataset]
name = "test"
shards = "{folder}/source/*.tar"
root = "{folder}/out"
fields = ["url", "original_width"]

[run]
workers = {workers}
checkpoint_rows = {checkpoint_rows}

{stages}
"""
STANDARD_STAGES = """\
[stages.faces]
source = "json"

[stages.lang]

[stages.prompts]

[stages.prompts.params]
min_faces = 1
lang = "en"

[stages.generate]
width = 64
height = 64
"""


@dataclass
class Workspace:
    """A folder with source shards and a pipeline file."""

    folder: Path
    file: Path

    @property
    def root(self) -> Path:
        return self.folder / "out"

    def load(self, *sets: str) -> Pipeline:
        return load_pipeline(self.file, sets)

    def run(self, *arguments: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`builder ARGUMENTS --pipeline FILE` in this process, tasks and all."""
        return _good(builder_here(*arguments, "--pipeline", str(self.file), cwd=cwd), check)

    def process(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """The same as a process, its tasks as processes of their own."""
        return _good(builder(*arguments, "--pipeline", str(self.file), **options), check)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of a question."""
        return answer(self.load(), Sql(sql, "test"), {})[1]


def _good(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    assert not check or done.returncode == 0, f"{done.args}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def builder(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`builder ARGUMENTS` as a process."""
    command = [sys.executable, "-m", "builder", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL, **options)


def ingest_here(pipeline: Pipeline) -> None:
    """Ingests every shard in this process."""
    root_schema.extend_schema(pipeline.layout, Snapshot(pipeline).source.columns)
    source = Snapshot(pipeline).source
    for shard, path in pipeline.asked.find().paths.items():
        ingest_shard(pipeline.layout, source, shard, path, "ingest-run")


def make_workspace(
    folder: Path,
    shards: dict[str, Sequence[Sample]] | None = None,
    *,
    stages: str = STANDARD_STAGES,
    workers: int = 1,
    checkpoint_rows: int = 2048,
    **options: Any,
) -> Workspace:
    """Fills a folder with shards, by name a list of samples each, and a pipeline."""
    if shards is None:
        shards = {"00000000": samples(8), "00000001": samples(8, start=8)}
    for name, made in shards.items():
        make_shard(folder / "source" / f"{name}.tar", made, **options)
    file = folder / "pipeline.toml"
    text = PIPELINE.format(folder=folder, stages=stages, workers=workers, checkpoint_rows=checkpoint_rows)
    file.write_text(text, "utf-8")
    return Workspace(folder, file)


#: Files whose tests take long: first, so that no process is left alone with one at the end.
LONG = (
    "test_real_models.py", "test_crash.py", "test_faults.py", "test_cli.py", "test_diffusion.py", "test_docs.py",
    "test_outdated.py", "test_hostile.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Files are dealt to the processes in the order of `pytest_collection_modifyitems`."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def workspace(tmp_path: Path) -> Callable[..., Workspace]:
    """`make_workspace` in the test's own folder."""
    return partial(make_workspace, tmp_path)


@pytest.fixture
def dataset(workspace: Callable[..., Workspace]) -> Workspace:
    """Two shards of eight samples, ingested."""
    made = workspace()
    ingest_here(made.load())
    return made


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made durable and what gets a name, as it happens: `fsync NAME`, `link NAME`, `rename NAME`.

    A folder's name ends in a slash; every temp file is called TEMP.
    """
    happened: list[str] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def called(path: Any) -> str:
        place = Path(path)
        return f"{place.name}/" if place.is_dir() else "TEMP" if place.name.endswith(".tmp") else place.name

    def on_fsync(descriptor: int) -> None:
        happened.append(f"fsync {called(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    def on_link(source: Any, target: Any) -> None:
        happened.append(f"link {called(target)}")
        link(source, target)

    def on_replace(source: Any, target: Any) -> None:
        happened.append(f"rename {called(target)}")
        replace(source, target)

    for name, recorded in {"fsync": on_fsync, "link": on_link, "replace": on_replace}.items():
        monkeypatch.setattr(os, name, recorded)
    return happened


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's width and colours do not decide what a test reads."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    os.environ.pop("PYTHONWARNINGS", None)


# --- commands whose tasks are done by this process ---


@dataclass
class Done:
    """How a command ended: its exit code, what it printed, its talk without times."""

    code: int
    out: str
    talk: list[str]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Runs `builder ARGUMENTS` in this process, its tasks too."""
    from support.kills import do

    monkeypatch.setitem(EXECUTORS, "local", EXECUTORS["local"])  # `do` replaces it
    monkeypatch.setattr(worker, "_report_progress", lambda done, failed: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    here = Path.cwd()

    def run(made: Workspace, *arguments: str) -> Done:
        capfd.readouterr()
        code = do(made, *arguments)
        printed = capfd.readouterr()
        return Done(code, printed.out, talk(printed.err))

    yield run
    os.chdir(here)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def talk(text: str) -> list[str]:
    """Lines without progress, and without their times."""
    lines = [line for line in text.splitlines() if not re.search(r" of [\d,]+ (rows|shards), ", line)]
    return [re.sub(r" in [\d.]+ s$", "", line) for line in lines]


def replace_everywhere(patch: pytest.MonkeyPatch, real: object, new: object) -> None:
    """Puts `new` in the place of a function in every module of the package that has it under some name."""
    found = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.split(".")[0] == "builder"
        for name, value in list(vars(module).items())
        if value is real
    ]
    assert found, real
    for module, name in found:
        patch.setattr(module, name, new)
