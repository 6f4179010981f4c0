"""Reads shards into a table and asks it questions: nothing is detected, generated or written.

    python examples/ingest_and_ask.py DIR

DIR gets the shards and the table.
"""

import subprocess
import sys
from pathlib import Path

import builder
from builder.demo.shards import make_demo_shards

folder = Path(sys.argv[1])
shards = make_demo_shards(folder / "source", samples=40)  # or your own: --set "dataset.shards=/data/*.tar"

# The command line does the work: one process a worker, safe to stop and to start again.
subprocess.run(
    [
        *(sys.executable, "-m", "builder", "ingest"),
        *("--set", f"dataset.shards={folder}/source/*.tar"),
        *("--set", f"dataset.root={folder}/table"),
    ],
    check=True,
)

# The table is parquet: ask it here, with `builder sql`, or with any tool that reads parquet.
dataset = builder.open_dataset(folder / "table")
print(dataset.sql("select shard, count(*) as samples, count(distinct caption) as captions from samples group by 1"))

longest = dataset.sql("select uid, caption from samples order by length(caption) desc, uid limit 1").row(0, named=True)
print("longest caption:", longest["caption"])
print("its image:", len(dataset.read_member("image", uid=longest["uid"]) or b""), "bytes")

# samples() is a polars LazyFrame over the same files.
frame = dataset.samples().select("shard", "row", "source_width", "source_height").collect()
print(frame.describe())
