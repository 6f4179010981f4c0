"""Images on a CPU: the stage `generate` with two tiny pipelines against the bare pipelines called in a loop.

    python -m bench.images [--rounds 5] [--images 960]

`builder stage generate --redo` over two shards with one worker, against the same pipeline called on the same prompts in
batches of the same size, every image with a generator of its own, the answers thrown away. The same process does both
in turn: it waits with everything imported, and takes the task from the engine in place of the process that it would
start.
Of a task all counts: loading the model, the batch that tries it, the rows that are asked about alone, JPEG, edits tars,
commits, folds. Of a bare loop the loop alone counts; its pipeline is loaded before. By wall time, which is the target
and rough on a machine that others use: the stage's threads use a second core, torch's own are held to one as the engine
does. `bench/gpu_generate.py` measures real shapes on a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from bench import corpus
from bench.report import Result, compared, table
from builder import exit_codes
from builder.engine.work import Choice
from builder.engine.worker import run_task
from builder.executors.base import DEFAULTS, Ended, RunSettings, Submission
from builder.executors.by_name import EXECUTORS
from builder.executors.local import LocalExecutor
from builder.progress import Talk
from builder.store.layout import RunFiles
from builder.table.sql_text import Sql
from builder.verbs.ingest import run_ingest
from builder.verbs.pipeline import load_pipeline
from builder.verbs.sql import answer
from builder.verbs.stage import run_stage
from tests.support import tiny_diffusers
from tests.support.in_process import Tasks

#: Images of a round, the model's batch and steps, and the side of the image, px.
IMAGES, BATCH, STEPS, SIDE = 960, 8, 4, 64
TARGET = 0.9
PIPELINE = """\
[dataset]
name = "bench"
shards = "{shards}/*.tar"
root = "{folder}/out"

[run]
workers = 1

[stages.generate]
sql = "{folder}/prompts.sql"
backend = "diffusers"
model = "{model}"
dtype = "float32"
steps = {steps}
width = {side}
height = {side}
batch_size = {batch}
"""
PROMPTS = "select shard, row, uid, key, caption as prompt, 0 as draw from samples"


def measure(rounds: int, folder: Path, images: int = IMAGES) -> list[Result]:
    """Images per second of the stage and of the bare loop, for each tiny pipeline."""
    shards = corpus.make(folder, corpus.Shards(f"images-{images}", 2, images // 2))
    makers = {"tiny SD": tiny_diffusers.make_sd, "tiny DiT": tiny_diffusers.make_dit}
    return [_measure(name, make, rounds, shards[0].parent, images) for name, make in makers.items()]


def _measure(name: str, make: Callable[[Path], Path], rounds: int, shards: Path, images: int) -> Result:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make(folder / "model")
        (folder / "prompts.sql").write_text(PROMPTS, "utf-8")
        file = folder / "pipeline.toml"
        values = {"shards": shards, "folder": folder, "model": model, "steps": STEPS, "side": SIDE, "batch": BATCH}
        file.write_text(PIPELINE.format(**values), "utf-8")
        run_ingest(load_pipeline(file), Talk(quiet=True))
        prompts = [str(row[4]) for row in answer(load_pipeline(file), Sql(PROMPTS, "bench"), {})[1]]
        with Worker(model, prompts) as worker:

            def whole_stage(count: int = images) -> float:
                choice = Choice(redo=True, where=f"row < {count // 2}")
                with mock.patch.dict(EXECUTORS, local=lambda: worker):
                    done = run_stage(load_pipeline(file), "generate", choice, Talk(quiet=True))
                if done["ok"] != count:
                    raise SystemExit(f"the stage answered {done['ok']} of {count} rows: {done.counts}")
                return count / worker.took

            whole_stage(4 * BATCH)  # what a process does once only: imports of the engine's threads, caches of kernels
            pairs = [(whole_stage(), images / worker.ask("loop")) for _ in range(rounds)]
    ours, peer = ([pair[side] for pair in pairs] for side in (0, 1))
    what = f"images: stage, {name}, {images} of {SIDE} px, batches of {BATCH} / bare loop"
    return compared(what, ours, peer, TARGET, unit="images/s", more=True)


class Worker(LocalExecutor):
    """An executor: a process that loops over prompts with a bare pipeline, or does a task, when asked to."""

    def __init__(self, model: Path, prompts: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with mock.patch.dict(os.environ, DEFAULTS):
            self._process = context.Process(target=_serve, args=(model, prompts, theirs), daemon=True)
            self._process.start()
        theirs.close()
        self._pipe.recv()
        #: Seconds of what was asked last.
        self.took = 0.0

    def ask(self, *order: str) -> float:
        self._pipe.send(order)
        self.took = self._pipe.recv()
        return self.took

    def submit(self, run: RunFiles, tasks: int, settings: RunSettings) -> Submission:
        assert tasks == 1
        self.ask("task", str(run.folder))
        return Tasks([[Ended(0, exit_codes.DONE, 0)]])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve(model: Path, prompts: list[str], pipe: Connection) -> None:
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - a task tells its progress there, to the end
    import torch
    from diffusers import AutoPipelineForText2Image

    bare = AutoPipelineForText2Image.from_pretrained(model, local_files_only=True)
    bare.set_progress_bar_config(disable=True)
    more = {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in type(bare).__name__ else {}

    def loop() -> None:
        for start in range(0, len(prompts), BATCH):
            chosen = prompts[start : start + BATCH]
            seeds = [torch.Generator().manual_seed(start + i) for i in range(len(chosen))]
            bare(chosen, height=SIDE, width=SIDE, num_inference_steps=STEPS, generator=seeds, **more)

    pipe.send("ready")
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        began = time.monotonic()
        if order[0] == "loop":
            loop()
        elif (code := run_task(Path(order[1]), 0)) != exit_codes.DONE:
            raise SystemExit(f"task 0 of '{order[1]}' ended with {code}")
        pipe.send(time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the stage `generate` with tiny pipelines on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, both methods once in each [%(default)s]")
    parser.add_argument("--images", type=int, default=IMAGES, help="of each pipeline and round [%(default)s]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(options.rounds, Path(folder), options.images)))


if __name__ == "__main__":
    main()
