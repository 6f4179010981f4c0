"""Any tars and any images through the product: `python tests/hostile.py DIR...`.

Each tar goes through ingest, status, a write that swaps image and caption of every good sample, and verify, and a
second time with one good sample more; each image is decoded alone and as the one sample of a shard by the stage
`faces`. Every file has a process of its own with bounded memory and time. What is refused is printed with its reason;
the exit code is 1 if anything crashed, hung, grew beyond its memory, printed what a terminal would obey, or differs
from what webdataset or Pillow reads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
from click.testing import CliRunner, Result
from PIL import ExifTags, Image

from builder.cli import main as builder_command
from builder.engine.batches import MAX_ERROR, answer
from builder.engine.reading import read_once
from builder.errors import RowError, ShardError
from builder.models import pictures
from builder.models.pictures import decode
from builder.progress import plain
from builder.stages.faces import Faces, FacesOptions
from builder.store.layout import Layout
from builder.table import partitions
from builder.table.edits import EditsTar
from builder.tar import blocks, indexing, record_heads
from conftest import PIPELINE, Sample, Workspace, ingest_here, picture, write_tar
from support.tars import by_builder, by_webdataset, rows_of

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".heif", ".tif", ".tiff", ".mpo", ".jp2", ".ppm", ".eps",
)  # fmt: skip
#: Seconds that webdataset may take for one tar: its reader copies a global pax header for every member.
BESIDE_S = 20
#: What may happen to a file that is none of our faults.
FINE = ("proven", "decoded", "refused", "failed")
#: What else may happen to it, in the order in which a file is judged.
WRONG = ("crashed", "hung", "grew", "wrong", "differs")


# --- beside webdataset ---


@dataclass
class Comparison:
    """One tar as webdataset and as the table has it.

    Attributes:
        samples: that both deliver with the same key, extensions and bytes, in the same order.
        said: what the table refuses or fails with a reason and webdataset reads.
        differs: everything else that is not the same.
        unread: why there was nothing to compare: webdataset raised, stops in silence or takes too long, or samples are
            scattered.
    """

    samples: int = 0
    said: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    unread: str = ""


def compared(path: Path, *, seconds: float = 0) -> Comparison:
    """Compares what webdataset reads in a tar with what the table delivers: every sample of it, or a reason.

    Args:
        seconds: what webdataset may take; 0 for as long as it likes.
    """
    result = Comparison()
    try:
        with _at_most(seconds):
            expected = by_webdataset(path)
    except Exception as error:
        result.unread = f"webdataset: {type(error).__name__}: {error}"
        return result
    try:
        rows, ours = rows_of(path), by_builder(path)
    except ShardError as error:
        result.said.append(f"{len(expected)} samples of webdataset: the shard is refused: {error.what}")
        return result
    if len({key for key, _ in expected}) < len(expected):
        result.unread = "its samples are not contiguous"
        return result
    theirs = iter(
        (key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), members)
        for key, members in expected
    )
    waiting = next(theirs, None)
    for row, (key, members) in zip(rows, ours, strict=True):
        same_key = waiting is not None and waiting[0] == key
        if row["source_error"] and (not same_key or waiting != (key, members)):
            result.said.append(f"sample '{key}': {row['source_error']}")
        elif waiting != (key, members):
            if mistake := mistake_of_tarfile(path):
                result.unread = f"Python's tarfile {mistake}"
                return result
            result.differs.append(f"sample {_told((key, members))}, webdataset: {_told(waiting)}")
            return result
        else:
            result.samples += 1
        if same_key:
            waiting = next(theirs, None)
    if waiting is not None:
        result.differs.append(f"no sample, webdataset: {_told(waiting)}")
    return result


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds, in the main thread only; 0 never does."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    if not seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mistake_of_tarfile(path: Path) -> str:
    """What Python's tarfile, which webdataset reads with, gets wrong in a tar without a word; empty if nothing.

    It ends at a header in which any number, be it the owner's, is none; and it takes what GNU tar and v7 keep where
    ustar has a prefix, times for example, for a folder.
    """
    index = indexing.index(path)
    with path.open("rb") as file:
        for place in sorted({*index.header.tolist(), *(index.data - blocks.BLOCK).tolist()}):
            file.seek(place)
            head = file.read(blocks.BLOCK)
            try:
                tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return f"takes byte {place} for the end"
            if head[345] and head[257:263] != b"ustar\0":
                return f"takes fields of the header at byte {place} for a folder"
    return ""


def _told(sample: tuple[str, dict[str, bytes]] | None) -> str:
    if sample is None:
        return "none"
    members = {name: f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:8]}" for name, data in sample[1].items()}
    return f"'{sample[0]}' {members}"


# --- one file, in a process of its own ---


@dataclass
class Outcome:
    """What happened to one file.

    Attributes:
        kind: one of `FINE` or `WRONG`.
        reason: of everything but `proven` and `decoded`.
        counts: by name: shards, ok and failed samples ...
        peak_mb: most memory that a process had, MB.
    """

    kind: str
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    peak_mb: int = 0


class Wrong(Exception):
    """A step of the product that did what it must never do."""


def try_tar(path: Path, folder: Path) -> Outcome:
    """ingest -> status -> write -> verify of one tar, and of it with a good sample more, by the command line."""
    made = workspace(folder)
    (folder / "source").mkdir()
    (folder / "source/shard.tar").symlink_to(path.resolve())
    shards = 1 + _grown(path, folder / "source/grown.tar")
    ingest = _command(made, "ingest", codes=(0, 3))
    refused = re.search(r"^refused shard 'shard': (.*)", ingest.stderr, re.MULTILINE)
    beside = compared(path, seconds=BESIDE_S)
    if refused is not None:
        return Outcome("refused", refused[1], {"compared": beside.samples})
    status = json.loads(_command(made, "status", "--json").stdout)
    _command(made, "status")
    _command(made, "sql", "select key, uid, caption, source_error, source_notes from samples")
    _write_sql(made)
    _command(made, "write")
    proof = json.loads(_command(made, "verify", "--json", codes=(0, 3)).stdout)
    good = status["stages"]["source"]["ok"]
    if proof["problems"] or (proof["shards"], proof["edited"]) != (shards, good) or good < shards - 1:
        raise Wrong(f"verify: {proof}")
    hybrids = [compared(hybrid, seconds=BESIDE_S) for hybrid in sorted((made.root / "shards").glob("*.tar"))]
    counts = {"ok": good, "failed": status["stages"]["source"]["failed"], "compared": beside.samples}
    if differs := beside.differs + [f"written: {one}" for hybrid in hybrids for one in hybrid.differs]:
        return Outcome("differs", differs[0], counts)
    return Outcome("proven", "", counts)


def _grown(path: Path, grown: Path) -> bool:
    """Writes a tar once more with a good sample behind its own members, so that there is one to swap.

    Returns whether it did: not for one that cannot be read, nor for one of more than 64 MB.
    """
    try:
        end = indexing.index(path).end
    except (ShardError, OSError):
        return False
    if end > 64 << 20:
        return False
    content = path.read_bytes()[:end]
    for name, data in Sample("hostile-good-sample").members():
        content += record_heads.make_record_head(name, len(data)) + data + bytes(blocks.padding(len(data)))
    grown.write_bytes(content + blocks.end_of_archive(len(content)))
    return True


def workspace(folder: Path, stages: str = "") -> Workspace:
    """A pipeline over `folder/source` whose write SQL is none of the table's own; without stages every sample can be
    edited, whatever its members are."""
    made = Workspace(folder, folder / "pipeline.toml")
    text = PIPELINE.format(folder=folder, stages=stages, workers=1, checkpoint_rows=2048)
    rules = 'image = "jpg"\nother_pictures = "drop"\njson = true\n'
    made.file.write_text(text if stages else f'{text}\n[write]\nselect = "{folder}/write.sql"\n{rules}', "utf-8")
    (folder / "write.sql").write_text("select shard, row, uid from samples where false", "utf-8")
    return made


def _write_sql(made: Workspace) -> None:
    """A write SQL that gives every good sample one new image and caption, the image out of an edits tar."""
    data = picture(9001)  # of no sample
    with EditsTar(Layout(made.root), "shard", "hostile", 0) as edits:
        place = edits.add("00000000.jpg", data)
        edits.close()
    (made.folder / "write.sql").write_text(
        f"select shard, row, uid, '{place.path}' as image_path, {place.offset} as image_offset, "
        f"{place.size} as image_size, 48 as image_width, 32 as image_height, "
        f"'{hashlib.sha256(data).hexdigest()}' as image_sha256, 'a new caption' as image_prompt, "
        "'a new caption' as prompt from samples where source_status = 'ok'",
        "utf-8",
    )


def _command(made: Workspace, *arguments: str, codes: tuple[int, ...] = (0,)) -> Result:
    """`builder ARGUMENTS` in this process; what it prints must be harmless on a terminal."""
    done = CliRunner().invoke(builder_command, [*arguments, "--pipeline", str(made.file)])
    if raw := {char for char in done.stdout + done.stderr if not char.isprintable() and char != "\n"}:
        raise Wrong(f"builder {arguments[0]} prints {raw}")
    if done.exit_code not in codes:
        raise Wrong(f"builder {arguments[0]}: exit code {done.exit_code}: {' | '.join(done.stderr.splitlines()[-12:])}")
    return done


def try_image(path: Path, folder: Path) -> Outcome:
    """Decodes one image alone, then as a shard's sample by the stage `faces`; both must say the same as Pillow."""
    data = path.read_bytes()
    refusal = kind = ""
    try:
        shape = decode(data).shape
    except RowError as error:
        refusal, kind = str(error), error.kind
    truth = _by_pillow(data)
    if truth is not None and (refusal or truth != shape):
        return Outcome("differs", f"Pillow: {truth}, decode: {refusal or shape}")
    if truth is None and not refusal:
        return Outcome("differs", f"Pillow does not decode it, decode: {shape}")
    made = workspace(folder)
    write_tar(folder / "source/shard.tar", [("0.jpg", data)])
    ingest_here(made.load())
    stage = Faces(FacesOptions(source="detector", min_face_px=200))  # a coarse search: what is tried is the decoding
    stage.setup("cpu")
    rows, _ = partitions.read_partition(made.load().layout, "shard", ["shard", "row", "uid"])
    nothing = pa.nulls(rows.num_rows)
    for name, type_ in zip(stage.inputs.names, stage.inputs.types, strict=True):
        rows = rows.append_column(name, nothing.cast(type_))
    [found] = read_once(made.load().layout, "shard", stage, rows)
    batch = found.given
    if batch.column("image").to_pylist() != [data]:
        return Outcome("wrong", "the bytes that the stage gets are not the image's")
    [(_, answered)] = answer(stage, batch)
    failure = getattr(answered, "error", "")
    if failure != (f"{kind}: {refusal}"[:MAX_ERROR] if refusal else ""):
        return Outcome("wrong", f"decode: {refusal or shape}, faces: {failure or 'answered'}")
    return Outcome("refused", refusal) if refusal else Outcome("decoded")


def _by_pillow(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and 3 of what Pillow makes of an image within our limits; None if it cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in pictures.FORMATS or image.width * image.height > pictures.MAX_PIXELS:
                    return None
                if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
                    return None  # nothing says which of its values is white
                width, height = image.convert("RGB").size
                return (width, height, 3) if _lies_on_its_side(image) else (height, width, 3)
        except Exception:
            return None


def _lies_on_its_side(image: Image.Image) -> bool:
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return False


def outcome_of(kind: str, path: Path) -> Outcome:
    """Tries one file in this process."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        try:
            outcome = (try_tar if kind == "tar" else try_image)(path, Path(folder))
        except Wrong as error:
            outcome = Outcome("wrong", str(error))
        except MemoryError as error:
            outcome = Outcome("grew", f"MemoryError: {error}")
        except Exception as error:
            outcome = Outcome("crashed", f"{type(error).__name__}: {error}")
    if outcome.kind != "refused" and re.search(r"MemoryError|out of memory|Cannot allocate", outcome.reason, re.I):
        outcome.kind = "grew"
    own, tasks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    outcome.peak_mb = max(own, tasks) // 1024
    return outcome


# --- all files ---


def try_file(kind: str, path: Path, *, memory: int, seconds: float) -> Outcome:
    """Tries one file in a process of its own.

    Args:
        memory: bytes of data that each of its processes may have.
        seconds: after these it counts as hung.
    """
    command = [sys.executable, __file__, "--child", kind, "--memory-gb", str(memory / 2**30), str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome("hung", f"not done after {seconds:g} s")
    if process.returncode:
        return Outcome("crashed", f"exit code {process.returncode}: {' | '.join(told.splitlines()[-4:])}")
    return Outcome(**json.loads(out.splitlines()[-1]))


def files_in(folders: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Tars and images in folders, sorted, by their names' ends; a file that is named itself is one of both."""
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            name = path.name.lower()
            if path.is_file() and name.endswith(TARS + IMAGES):
                yield ("tar" if name.endswith(TARS) else "image"), path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tries tars and images on builder.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="DIR", help="folders, or files")
    parser.add_argument("--workers", type=int, default=2, help="files at a time (default 2)")
    parser.add_argument("--seconds", type=float, default=120, help="time for one file (default 120)")
    parser.add_argument("--memory-gb", type=float, default=4, help="memory of each process (default 4)")
    parser.add_argument("--child", choices=("tar", "image"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    memory = int(options.memory_gb * 2**30)
    if options.child:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        print(json.dumps(asdict(outcome_of(options.child, options.paths[0]))))
        return 0
    started = time.monotonic()
    todo = list(files_in(options.paths))
    if not todo:
        parser.error(f"no tar and no image in {', '.join(map(str, options.paths))}")
    with ThreadPoolExecutor(options.workers) as pool:
        outcomes = list(
            pool.map(lambda one: try_file(*one, memory=memory, seconds=options.seconds), todo)
        )  # fmt: skip
    tell(todo, outcomes)
    print(f"hostile: {len(todo)} files in {time.monotonic() - started:.0f} s")
    return int(any(outcome.kind in WRONG for outcome in outcomes))


def tell(todo: Sequence[tuple[str, Path]], outcomes: Sequence[Outcome]) -> None:
    """One line a file that is not simply good, then the totals."""
    for (_, path), outcome in zip(todo, outcomes, strict=True):
        if outcome.reason:
            print(plain(f"{outcome.kind:<8} {path.name}: {outcome.reason}"))
    by_kind = {kind: [o for (k, _), o in zip(todo, outcomes, strict=True) if k == kind] for kind in ("tar", "image")}
    tars, images = (Counter(outcome.kind for outcome in by_kind[kind]) for kind in ("tar", "image"))
    counts: Counter[str] = sum((Counter(outcome.counts) for outcome in outcomes), Counter())
    print(f"tars: {len(by_kind['tar'])} shards, {tars['proven']} proven, {tars['refused']} refused")
    print(
        f"samples: {counts['ok']} ok, swapped; {counts['failed']} failed; {counts['compared']} as webdataset has them"
    )
    print(f"images: {len(by_kind['image'])}, {images['decoded']} decoded, {images['refused']} refused")
    wrong = tars + images
    print(", ".join(f"{wrong[kind]} {kind}" for kind in WRONG), end="; ")
    print(f"peak memory {max(outcome.peak_mb for outcome in outcomes)} MB")


if __name__ == "__main__":
    sys.exit(main())
