"""The demo: everything that builder does, on 200 samples of real photos."""

from __future__ import annotations

import glob
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from builder.demo.shards import TRUTH, faces_placed, make_demo_shards
from builder.errors import ConfigError
from builder.hybrid.verify.proof import Proof, summary
from builder.progress import Talk
from builder.sources.reader import MemberReader
from builder.store.files import write_atomic
from builder.table.sql_text import Sql
from builder.verbs.pipeline import Pipeline, load_pipeline
from builder.verbs.run import run_all
from builder.verbs.sql import answer
from builder.verbs.verify import prove
from builder.view.contact_sheet import contact_sheet

#: Pairs on the contact sheet.
_PAIRS = 8
_PIPELINE = """\
# The demo's pipeline: real photos, a real face detector and language model; the new images are sketches.
[dataset]
name   = "demo"
shards = {shards}
root   = {folder}
fields = ["url", "original_width", "original_height", "sha256"]

[run]
workers = {workers}

[stages.faces]
source = "auto"

[stages.lang]

[stages.prompts]

[stages.prompts.params]
min_faces = 1
lang      = "en"

[stages.generate]
"""
_COUNTS = Sql(
    "select count(*), sum(face_count), count(*) filter (lang = 'en'), count(prompt), count(image_path) from samples",
    "demo",
)
_CHOSEN = Sql(
    "select shard, row, uid, caption, image_prompt from samples where image_path is not null "
    "order by hash(uid), shard, row",
    "demo",
)


def run_demo(folder: Path, talk: Talk, *, workers: int = 2) -> bool:
    """Makes shards, runs everything on them and shows the result; returns whether all of it is as expected.

    Raises:
        ConfigError: the folder has other files in it.
    """
    pipeline = _prepare(folder, talk, workers)
    seconds: dict[str, float] = {}
    clean = True
    for name, outcome in run_all(pipeline, talk):
        seconds[name] = outcome.seconds
        clean = clean and outcome.is_clean
    started = time.monotonic()
    proof = prove(pipeline, talk)
    seconds["verify"] = time.monotonic() - started
    for problem in proof.problems:
        talk.say(f"wrong: {problem}")
    _, [(rows, found, english, prompts, images)] = answer(pipeline, _COUNTS, {})
    placed = faces_placed(folder / "source")
    _, chosen = answer(pipeline, _CHOSEN, {})
    sheet = folder / "contact_sheet.png"
    write_atomic(sheet, contact_sheet([_pair(pipeline, *row) for row in chosen[:_PAIRS]]), durable=False)
    _show(
        {
            "rows": rows,
            "faces found / placed": f"{found} / {placed}",
            "English captions": english,
            "prompts": prompts,
            "images": images,
        },
        proof,
        seconds,
    )
    _next(folder, pipeline, chosen[0][2], sheet)
    return bool(clean and not proof.problems and not proof.unread and found == placed)


def _prepare(folder: Path, talk: Talk, workers: int) -> Pipeline:
    path = folder / "pipeline.toml"
    if folder.is_dir() and any(folder.iterdir()) and not path.exists():
        raise ConfigError(
            f"'{folder}' has files that are not a demo's", fix="name another folder: builder demo --out DIR"
        )
    if not (folder / "source" / TRUTH).exists():
        started = time.monotonic()
        made = make_demo_shards(folder / "source")
        talk.say(f"source: {len(made)} shards of photos in {time.monotonic() - started:.1f} s")
    write_atomic(path, _pipeline_text(folder, workers).encode(), durable=False)
    return load_pipeline(path)


def _pipeline_text(folder: Path, workers: int) -> str:
    """The demo's pipeline. A json string is a TOML string, too; shards are a pattern, so the folder is escaped."""
    shards = f"{glob.escape(str(folder))}/source/*.tar"
    return _PIPELINE.format(shards=json.dumps(shards), folder=json.dumps(str(folder)), workers=workers)


def _pair(
    pipeline: Pipeline, shard: str, row: int, uid: str, caption: str, prompt: str
) -> tuple[bytes, bytes, str, str]:
    with MemberReader(pipeline.layout, shard, ["image", "edit"]) as reader:
        return reader.read(row, "image") or b"", reader.read(row, "edit") or b"", caption, prompt


def _show(counts: dict[str, Any], proof: Proof, seconds: dict[str, float]) -> None:
    lines = [*counts.items(), *summary(proof)[2:3], *summary(proof)[4:]]
    print()
    for name, value in lines:
        print(f"  {name:<25} {value}")
    print("  seconds                   " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def _next(folder: Path, pipeline: Pipeline, uid: str, sheet: Path) -> None:
    hybrid = pipeline.layout.hybrid(pipeline.layout.partitions()[0])
    file, command = (shlex.quote(text) for text in (pipeline.config.path, _command()))
    print(
        f"""
Try next:
  {command} sql "select lang, count(*) from samples where face_count > 0 group by 1" --pipeline {file}
  {command} show {uid} --pipeline {file}
  tar tvf {shlex.quote(str(hybrid))} | head       # hybrid shards of {folder}/source
Look at {sheet}: originals next to new images."""
    )


def _command() -> str:
    """The command line as it can be called from here."""
    return "builder" if shutil.which("builder") else sys.argv[0]
