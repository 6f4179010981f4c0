"""Faces on a CPU: the cascade against a plain one, the stage against a bare detector loop.

    python -m bench.faces [--rounds 5] [--samples 1400] [--shards DIR]

**The cascade**: `builder.models.mtcnn` and `bench.plain_mtcnn` on the same decoded pictures in one process and one
thread, in turn; images per second of CPU time. Both count the same faces, or there is no figure.

**The stage**: `builder stage faces --redo` over two shards with two workers, as a user starts it, against two processes
that run the detector over the same pictures, decoded before and held in memory. Wall time of the slower of the two:
of a worker what its task says it took, so all but the start of the interpreter and its imports: reading, decoding,
loading the model, commits, folds. Of a bare loop the loop alone.

Pictures: shards of --shards, or those of `builder demo`, made anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from bench.plain_mtcnn import PlainMtcnn
from bench.report import Result, compared, rounds_of, table
from builder.demo_shards import make_demo_shards
from builder.models.mtcnn import Mtcnn
from builder.models.pictures import decode

WORKERS = 2
#: Pictures of the comparison of the cascades.
CASCADE_PICTURES = 100
#: Share of pictures in which both cascades must count the same faces.
AGREEMENT = 0.995
#: Targets: times the images per second.
CASCADE_TARGET, STAGE_TARGET = 1.5, 0.9
#: What counts as a face, as the stage does by default.
MIN_SCORE, MIN_SIZE = 0.9, 0.03
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
PIPELINE = """\
[dataset]
name = "bench"
shards = "{folder}/*.tar"
root = "{root}"

[run]
workers = {workers}

[stages.faces]
source = "detector"
"""


def measure(rounds: int, folder: Path) -> list[Result]:
    """Both comparisons over the tars of a folder, as many as `WORKERS`."""
    shards = sorted(folder.glob("*.tar"))
    if len(shards) != WORKERS:
        raise SystemExit(f"'{folder}' holds {len(shards)} shards, one a worker is wanted: {WORKERS}")
    return [cascade(rounds, pictures(shards[0])[:CASCADE_PICTURES]), stage(rounds, shards)]


def pictures(shard: Path) -> list[np.ndarray]:
    """The decoded pictures of a shard."""
    with tarfile.open(shard) as archive:
        return [
            decode(archive.extractfile(member).read())  # type: ignore[union-attr]
            for member in archive
            if Path(member.name).suffix.lower() in IMAGES
        ]


# --- the cascade ---


def cascade(rounds: int, images: list[np.ndarray]) -> Result:
    """Images per second of CPU time, ours and the plain one."""
    ours, plain = Mtcnn(), PlainMtcnn()
    check_same(ours, plain, images)

    def rate(detector: Mtcnn | PlainMtcnn) -> float:
        start = time.process_time()
        for image in images:
            detector.detect(image)
        return len(images) / (time.process_time() - start)

    ours_rates, plain_rates = rounds_of(rounds, lambda: rate(ours), lambda: rate(plain))
    name = f"faces: cascade, {len(images)} images, one thread"
    return compared(name, ours_rates, plain_rates, CASCADE_TARGET, unit="images/s", more=True)


def count(detector: Mtcnn | PlainMtcnn, image: np.ndarray) -> int:
    boxes, scores = detector.detect(image)
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    return int(((scores >= MIN_SCORE) & (sides >= MIN_SIZE * max(image.shape[:2]))).sum())


def check_same(ours: Mtcnn, plain: PlainMtcnn, images: list[np.ndarray]) -> None:
    """Leaves if the cascades count other faces."""
    counts = [(count(ours, image), count(plain, image)) for image in images]
    same = sum(a == b for a, b in counts)
    if same < AGREEMENT * len(images) or not any(b for _, b in counts):
        raise SystemExit(f"the cascades agree on {same} of {len(images)} images: {[c for c in counts if c[0] != c[1]]}")


# --- the stage ---


def stage(rounds: int, shards: list[Path]) -> Result:
    """Images per second, the stage's and that of bare loops in as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.toml"
        file.write_text(PIPELINE.format(folder=shards[0].parent, root=f"{folder}/out", workers=WORKERS), "utf-8")
        builder("ingest", file)
        with BareLoops(shards) as bare:
            ours, peer = rounds_of(
                rounds, lambda: bare.images / task_seconds(file), lambda: bare.images / bare.seconds()
            )
    name = f"faces: stage, {bare.images} images, {WORKERS} workers"
    return compared(name, ours, peer, STAGE_TARGET, unit="images/s", more=True)


def builder(command: str, file: Path, *options: str) -> None:
    """`builder COMMAND`; leaves with its message if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "builder", *command.split(), "--pipeline", str(file), *options],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"builder {command}: {done.stderr}")


def task_seconds(file: Path) -> float:
    """Does all rows (again); the seconds of the slower task, by its own account."""
    runs = file.parent / "out" / "runs"
    before = set(runs.iterdir())
    builder("stage faces", file, "--redo")
    (run,) = set(runs.iterdir()) - before
    results = [json.loads(path.read_text("utf-8")) for path in (run / "tasks").glob("*.result.json")]
    if len(results) != WORKERS or any(result["failed"] or not result["ok"] for result in results):
        raise SystemExit(f"'{run}' did not answer every row: {results}")
    return max(float(result["seconds"]) for result in results)


class BareLoops:
    """One process a shard, its pictures decoded in memory and the detector loaded, that waits to be asked."""

    def __init__(self, shards: list[Path]) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # as for a worker
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for shard in shards:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_bare_loop, args=(shard, theirs), daemon=True)
            process.start()
            self._pipes.append(pipe)
            self._processes.append(process)
        self.images = sum(pipe.recv() for pipe in self._pipes)

    def seconds(self) -> float:
        """All loops once at the same time; the seconds of the slower one."""
        for pipe in self._pipes:
            pipe.send(True)
        return max(pipe.recv() for pipe in self._pipes)

    def __enter__(self) -> BareLoops:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(False)
            process.join()


def _bare_loop(shard: Path, pipe: Connection) -> None:
    images, detector = pictures(shard), Mtcnn()
    pipe.send(len(images))
    while pipe.recv():
        start = time.monotonic()
        for image in images:
            detector.detect(image)
        pipe.send(time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the detector and the stage `faces` on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, every method once in each [%(default)s]")
    parser.add_argument("--samples", type=int, default=1400, help="in all, where the shards are made [%(default)s]")
    parser.add_argument("--shards", type=Path, help=f"a folder with {WORKERS} shards instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.shards is None:
            make_demo_shards(Path(folder), samples=options.samples)
        print(table(measure(options.rounds, options.shards or Path(folder))))


if __name__ == "__main__":
    main()
