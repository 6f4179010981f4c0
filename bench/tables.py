"""Roots of thousands of partitions for the benchmarks of the table, made without ingest.

Every partition is a file of its own with its own uids; the column files that it was folded from are one file under many
names, since nothing that is measured here reads them.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.corpus import SEED
from builder.store.layout import Layout
from builder.table import column_files, partitions, root_schema
from builder.table.schema import SOURCE
from builder.verbs.pipeline import Pipeline, load_pipeline
from builder.verbs.snapshot import Snapshot

#: Share of rows with an answer, by stage.
DONE = {"faces": 1.0, "lang": 1.0, "prompts": 0.0, "generate": 0.0}
LANGUAGES = ("en", "de", "fr", "ru", "zh")


def make(folder: Path, pipeline: Pipeline, shards: int, rows: int) -> Layout:
    """Makes the root of a pipeline, unless it is there: source tars of no bytes, column files, partitions."""
    layout = pipeline.layout
    if (layout.root / "made").exists():
        return layout
    root_schema.extend_schema(layout, pipeline.own_columns)
    (folder / "source").mkdir(parents=True, exist_ok=True)
    layout.samples.mkdir(parents=True, exist_ok=True)
    content = _content(pipeline, rows)
    shared = layout.root / "shared.parquet"
    pq.write_table(content, shared)
    for number in range(shards):
        _shard(folder, layout, pipeline, f"{number:08d}", content, shared)
    (layout.root / "made").touch()
    return layout


def _shard(folder: Path, layout: Layout, pipeline: Pipeline, name: str, content: pa.Table, shared: Path) -> None:
    path = folder / "source" / f"{name}.tar"
    path.touch()
    layout.column_folder(name).mkdir(parents=True)
    generations = {SOURCE: 1, **{stage: 1 for stage, share in DONE.items() if share}}
    for stage, generation in generations.items():
        os.link(shared, layout.column_file(name, stage, generation))
    random = np.random.default_rng(int(name) + SEED)
    uids = [text[i : i + 32] for text in [random.bytes(16 * content.num_rows).hex()] for i in range(0, len(text), 32)]
    named = content.set_column(content.column_names.index("shard"), "shard", pa.array([name] * content.num_rows))
    named = named.set_column(named.column_names.index("uid"), "uid", pa.array(uids))
    write = partial(column_files.write_parquet, named)
    source = Snapshot(pipeline).source.identify(path)
    write(partitions.folded_metadata(generations, 1, name, source), layout.partition(name))


def _content(pipeline: Pipeline, rows: int) -> pa.Table:
    """Rows of one partition."""
    random = np.random.default_rng(SEED)
    columns = {}
    for column in Snapshot(pipeline).columns:
        values = pa.nulls(rows, column.type)
        if column.name == "row":
            values = pa.array(range(rows), pa.int64())
        elif column.name == "caption":
            values = pa.array(
                [f"a photo of street {i} at {random.integers(1 << 30)} in the evening" for i in range(rows)]
            )
        elif column.name in ("key", "uid", "url", "sha256"):
            values = pa.array([random.bytes(16).hex() for _ in range(rows)])
        elif column.name == "face_count":
            values = pa.array(random.choice([0, 1, 2, 5], rows, p=[0.7, 0.18, 0.09, 0.03]), column.type)
        elif column.name == "lang":
            values = pa.array(random.choice(LANGUAGES, rows))
        elif column.name == "source_members":
            places = [
                [{"ext": "jpg", "header": i * 40_000, "data": i * 40_000 + 512, "size": 39_000}] for i in range(rows)
            ]
            values = pa.array(places, column.type)
        elif column.name.endswith("_status") and DONE.get(column.stage, 1.0):
            values = pa.array(["ok"] * rows)
        elif column.name.endswith("_run") and DONE.get(column.stage, 1.0):
            values = pa.array([f"20260101-000000-{column.stage}"] * rows)
        elif column.name.endswith("_inputs") and DONE.get(column.stage, 1.0):
            values = pa.array(random.integers(0, 1 << 62, rows), column.type)
        columns[column.name] = values
    return pa.table(columns)


PIPELINE = """\
[dataset]
name = "bench"
shards = "{folder}/source/*.tar"
root = "{folder}/out"
fields = ["url", "sha256"]

[stages.faces]
source = "json"

[stages.lang]

[stages.prompts]

[stages.prompts.params]
min_faces = 1
lang = "en"

[stages.generate]
"""


def pipeline_in(folder: Path) -> Pipeline:
    """A pipeline of all embedded stages over that folder's shards."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pipeline.toml"
    file.write_text(PIPELINE.format(folder=folder), "utf-8")
    return load_pipeline(file)
