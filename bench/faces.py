"""Faces on a CPU: the cascade against a plain one, the stage against a bare detector loop.

    python -m bench.faces [--rounds 5] [--samples 1200] [--shards DIR]

**The cascade**: `builder.models.faces.mtcnn` and `bench.plain_mtcnn` on the same decoded pictures in one process and
one thread, in turn; images per second of CPU time. Both count the same faces, or there is no figure.

**The stage**: `builder stage faces --redo` over two shards with two workers, against two detector loops over the same
pictures, decoded before and held in memory. The same two processes do both in turn: they wait with everything imported,
and take tasks from the engine in place of the processes that it would start. Of a task all counts: loading the model,
reading, decoding, commits, folds. Of a bare loop the loop alone counts; its detector is loaded before. Twice: by the
wall time of the slower process, which is the target and rough on a machine that others use, and by CPU time.

Pictures: the shards of a folder, or those of `builder demo`, made anew: photos of 0.1 megapixels, a quarter with faces.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench.plain_mtcnn import PlainMtcnn
from bench.report import Result, compared, rounds_of, table
from builder import exit_codes
from builder.demo.shards import make_demo_shards
from builder.engine.work import Choice
from builder.engine.worker import run_task
from builder.executors.base import Ended, RunSettings, Submission
from builder.executors.by_name import EXECUTORS
from builder.executors.local import LocalExecutor
from builder.models.faces.mtcnn import Mtcnn
from builder.models.pictures import decode
from builder.progress import Talk
from builder.store.layout import RunFiles
from builder.verbs.ingest import run_ingest
from builder.verbs.pipeline import load_pipeline
from builder.verbs.stage import run_stage
from tests.support.in_process import Tasks

WORKERS = 2
#: Samples of shards that are made.
SAMPLES = 1200
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
    """Both comparisons over the tars of a folder, as many as `WORKERS`; they are made where there are none."""
    if not any(folder.glob("*.tar")):
        make_demo_shards(folder, samples=SAMPLES)
    shards = sorted(folder.glob("*.tar"))
    if len(shards) != WORKERS:
        raise SystemExit(f"'{folder}' holds {len(shards)} shards, one a worker is wanted: {WORKERS}")
    return [cascade(rounds, pictures(shards[0])[:CASCADE_PICTURES]), *stage(rounds, shards)]


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
    """Images per second of CPU time, ours and the plain one, from faces of the same size on."""
    ours, plain = Mtcnn(min_face_px=20), PlainMtcnn(min_face_px=20)
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


def stage(rounds: int, shards: list[Path]) -> list[Result]:
    """Images per second of wall time and of CPU time, the stage's and that of bare loops in as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.toml"
        file.write_text(PIPELINE.format(folder=shards[0].parent, root=f"{folder}/out", workers=WORKERS), "utf-8")
        run_ingest(load_pipeline(file), Talk(quiet=True))
        with Processes(shards) as processes:
            images = processes.images

            def whole_stage() -> tuple[float, float]:
                with mock.patch.dict(EXECUTORS, local=lambda: processes):
                    done = run_stage(load_pipeline(file), "faces", Choice(redo=True), Talk(quiet=True))
                if done["ok"] != images:
                    raise SystemExit(f"the stage answered {done['ok']} of {images} rows: {done.counts}")
                return processes.took

            def bare() -> tuple[float, float]:
                return processes.ask([("loop",)] * WORKERS)

            values = [(whole_stage(), bare()) for _ in range(rounds)]
    results = []
    for i, clock in enumerate(("wall", "CPU")):
        ours, peer = ([images / pair[side][i] for pair in values] for side in (0, 1))
        name = f"faces: stage, {images} images, {WORKERS} workers, {clock} time"
        results.append(compared(name, ours, peer, STAGE_TARGET, unit="images/s", more=True))
    return results


class Processes(LocalExecutor):
    """An executor: one process for each shard, the shard's pictures decoded in its memory.

    When asked to, a process does a bare loop over these pictures, or a task.
    """

    def __init__(self, shards: list[Path]) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # as the engine sets it
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for shard in shards:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(shard, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        self.images: int = sum(pipe.recv() for pipe in self._pipes)
        #: Wall seconds of the slowest process and CPU seconds of all, of what was asked last.
        self.took = (0.0, 0.0)

    def ask(self, orders: list[tuple[Any, ...]]) -> tuple[float, float]:
        """One order for each process, all at the same time."""
        for pipe, order in zip(self._pipes, orders, strict=True):
            pipe.send(order)
        answers = [pipe.recv() for pipe in self._pipes]
        self.took = (max(wall for wall, _ in answers), sum(cpu for _, cpu in answers))
        return self.took

    def submit(self, run: RunFiles, tasks: int, settings: RunSettings) -> Submission:
        """Does the tasks of a run, one for each process."""
        assert tasks == WORKERS
        self.ask([("task", str(run.folder), number) for number in range(tasks)])
        return Tasks([[Ended(number, exit_codes.DONE, 0) for number in range(tasks)]])

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join()


def _serve(shard: Path, pipe: Connection) -> None:
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - a task tells its progress there, to the end
    images, detector = pictures(shard), Mtcnn()
    pipe.send(len(images))
    for order in _orders(pipe):
        wall, cpu = time.monotonic(), time.process_time()
        if order[0] == "loop":
            for image in images:
                detector.detect(image)
        elif (code := run_task(Path(order[1]), order[2])) != exit_codes.DONE:
            raise SystemExit(f"task {order[2]} of '{order[1]}' ended with {code}")
        pipe.send((time.monotonic() - wall, time.process_time() - cpu))


def _orders(pipe: Connection) -> Iterator[tuple[Any, ...]]:
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the detector and the stage `faces` on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, every method once in each [%(default)s]")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in all, where the shards are made [%(default)s]")
    parser.add_argument("--shards", type=Path, help=f"a folder with {WORKERS} shards instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.shards is None:
            make_demo_shards(Path(folder), samples=options.samples)
        print(table(measure(options.rounds, options.shards or Path(folder))))


if __name__ == "__main__":
    main()
