"""One measured piece of work in a process of its own: `python -m bench.work NAME ARGUMENTS`.

Imports lie outside the clock, and only what a piece of work needs is imported, for the sake of memory. The process
prints `ready`, waits for a line, works, and prints `{"seconds": ..., "peak_mb": ...}`: several begin together.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench import corpus, tables
from bench.report import peak_mb
from builder.engine import workset
from builder.engine.work import Choice
from builder.hybrid import shard_plan, splice
from builder.hybrid.edit import Rules
from builder.sources.ingest import ingest_shard
from builder.sources.tars import shards
from builder.stages.contract import columns_of
from builder.stages.finding import find as find_stage
from builder.store.layout import Layout
from builder.table import column_files, commits, partitions, root_schema, schema
from builder.table.query import Samples
from builder.table.sql_text import read_sql
from builder.verbs.plan import make_plan
from builder.verbs.snapshot import Snapshot
from builder.verbs.status import read_status
from builder.verbs.works import work_of

#: Every json field of DataComp and img2dataset is carried.
READING = shards.TarShards(dict(schema.FIELD_TYPES))
#: The question of the benchmark.
QUESTION = "select count(*) from samples where face_count > 0 and lang = 'en'"

Work = Callable[[], Any]


def tiny() -> Path:
    """A shard of 50 samples: what a library sets up when it is first used counts with its import."""
    (path,) = corpus.make(Path(tempfile.gettempdir()) / f"builder-bench-{os.getuid()}", corpus.Shards("tiny", 1, 50))
    return path


def hybrid_columns() -> tuple[schema.Column, ...]:
    """Columns of a root with generated images."""
    stages = (columns_of(find_stage(name)) for name in ("prompts", "generate"))
    merged = READING.columns
    for columns in stages:
        merged = schema.merge(merged, columns)
    return merged


# --- ours ---


def ingest(root: str, *paths: str) -> Work:
    """Shards into a new root, durably."""
    layout = Layout(Path(root))
    shutil.rmtree(root, ignore_errors=True)
    root_schema.extend_schema(layout, READING.columns)
    ingest_shard(layout, READING, tiny().stem, tiny(), "bench")
    shutil.rmtree(root)
    root_schema.extend_schema(layout, READING.columns)

    def work() -> None:
        for path in paths:
            ingest_shard(layout, READING, Path(path).stem, Path(path), "bench")

    return work


def write(root: str, durable: str, *shards: str) -> Work:
    """The hybrid shards of a root, plan and manifest included."""
    layout = Layout(Path(root))
    if durable == "no":
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
    sql, columns = read_sql("sql/write.sql"), hybrid_columns()

    def work() -> None:
        for plan in shard_plan.plans(layout, columns, shards, sql, {}, Rules()):
            splice.write_shard(layout, plan)

    work()
    for shard in shards:
        layout.hybrid(shard).unlink()
        layout.manifest(shard).unlink()
    return work


def commit(root: str, shard: str) -> Work:
    """Three columns of a stage into a partition: column file and fold, durably."""
    layout = Layout(Path(root))
    lang = columns_of(find_stage("lang"))
    state = partitions.partition_state(layout, shard)
    assert state is not None
    count = pq.read_metadata(layout.partition(shard)).num_rows
    run = f"bench-{os.getpid()}"
    values = {
        "lang": ["en", "de"] * (count // 2), "lang_score": [0.9, 0.8] * (count // 2), "lang_status": ["ok"] * count,
        "lang_run": [run] * count, "lang_inputs": range(count), "row": range(count),
    }  # fmt: skip
    kinds = {column.name: column.type for column in lang} | {"row": pa.int64()}
    done = pa.table({name: pa.array(values.get(name, [None] * count), kind) for name, kind in kinds.items()})
    have, _ = partitions.read_partition(layout, shard, ["lang_run"])
    previous = have["lang_run"].to_pylist()

    def work() -> None:
        commits.commit(layout, shard, "lang", lang, done, previous, rows=state.rows, attempt=run)
        partitions.heal(layout, [shard])

    return work


def ask(folder: str) -> Work:
    """The question over a root's partitions, the connection included."""
    pipeline = tables.pipeline_in(Path(folder))

    def work() -> None:
        with Samples(pipeline.layout, Snapshot(pipeline).columns, pipeline.layout.partitions()) as samples:
            samples.fixed(QUESTION)

    return work


def plan(folder: str) -> Work:
    pipeline = tables.pipeline_in(Path(folder))
    return lambda: make_plan(pipeline, Choice())


def status(folder: str) -> Work:
    pipeline = tables.pipeline_in(Path(folder))
    return lambda: read_status(pipeline)


def heal(folder: str) -> Work:
    """Looks whether every partition holds what its column files do."""
    pipeline = tables.pipeline_in(Path(folder))
    return lambda: partitions.heal(pipeline.layout, Snapshot(pipeline).shards)


def freeze(folder: str) -> Work:
    """The work set of the language stage, all rows."""
    pipeline = tables.pipeline_in(Path(folder))
    path = pipeline.layout.root / "bench-workset.parquet"
    return lambda: workset.freeze(
        pipeline.layout, path, work_of(Snapshot(pipeline), "lang", Choice(redo=True), Snapshot(pipeline).shards)
    )


# --- peers ---


def webdataset_ingest(out: str, path: str) -> Work:
    """webdataset's reader, json.loads, the same columns as far as it can know them, parquet."""
    import webdataset

    def work() -> None:
        kept: dict[str, list[Any]] = {
            name: [] for name in (*schema.FIELD_TYPES, "uid", "caption", "face_bboxes", "txt")
        }
        for sample in webdataset.WebDataset(path, shardshuffle=False, empty_check=False):
            values = json.loads(sample["json"])
            for name, column in kept.items():
                column.append(values.get(name) if name != "txt" else sample["txt"].decode())
        types = {**schema.FIELD_TYPES, "face_bboxes": schema.BOXES}
        columns = {name: pa.array(column, types.get(name, pa.string())) for name, column in kept.items()}
        column_files.write_parquet(pa.table(columns), {}, Path(out))

    return work


def webdataset_write(source: str, out: str, edits: str) -> Work:
    """webdataset's reader into its ShardWriter, the edited samples replaced."""
    import webdataset

    new = {row["key"]: row for row in pq.read_table(edits).to_pylist()}

    def samples() -> Iterator[dict[str, Any]]:
        for sample in webdataset.WebDataset(source, shardshuffle=False, empty_check=False):
            edit = new.get(sample["__key__"])
            if edit is not None:
                values = {**json.loads(sample["json"]), "caption": edit["prompt"]}
                text = edit["prompt"].encode()
                body = json.dumps(values, indent=4).encode()
                sample = {"__key__": sample["__key__"], "jpg": edit["image"], "json": body, "txt": text}
            yield {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}

    def work() -> None:
        with webdataset.ShardWriter(out, maxcount=10**9, maxsize=1e12, verbose=0) as sink:
            for sample in samples():
                sink.write(sample)

    return work


def rewrite(path: str) -> Work:
    """pyarrow reads a partition and writes it, durably: fsync, rename, fsync of the folder."""
    target = Path(path).with_name("peer.tmp")

    def work() -> None:
        data = pq.read_table(path)
        column_files.write_parquet(data, {}, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())
        target.replace(target.with_suffix(".done"))
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    return work


def polars_ask(folder: str) -> Work:
    import polars

    layout = tables.pipeline_in(Path(folder)).layout
    paths = [layout.partition(shard) for shard in layout.partitions()]
    chosen = (polars.col("face_count") > 0) & (polars.col("lang") == "en")
    return lambda: polars.scan_parquet(paths).filter(chosen).select(polars.len()).collect()


WORKS: dict[str, Callable[..., Work]] = {
    made.__name__: made
    for made in (
        ingest, write, commit, ask, plan, status, heal, freeze,
        webdataset_ingest, webdataset_write, rewrite, polars_ask,
    )
}  # fmt: skip

#: What runs in workers, and its peers.
OF_WORKERS = {"ingest", "write", "commit", "webdataset_ingest", "webdataset_write", "rewrite"}


def main() -> None:
    name, *arguments = sys.argv[1:]
    work = WORKS[name](*arguments)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    main()
