"""The whole small pipeline on two small shards: faces, languages, prompts, images, hybrid shards, proof.

    python examples/small_pipeline.py DIR

DIR gets the shards and the dataset.
"""

import subprocess
import sys
from pathlib import Path

import builder
from builder.demo.shards import make_demo_shards

folder = Path(sys.argv[1])
make_demo_shards(folder / "source", samples=40)

# pipelines/small.toml on other shards. A pipeline file of one's own begins with: builder init DIR
PIPELINE = (
    *("--scale", "small"),
    *("--set", f"dataset.shards={folder}/source/*.tar"),
    *("--set", f"dataset.root={folder}/out"),
)


def run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "builder", *command, *PIPELINE], check=True)


run("plan")  # what there is to do; starts nothing
run("run")  # ingest, every stage, write; again after a stop to go on
run("verify")  # exactly the chosen samples differ, every other byte is the source's
run("status")

# Other prompts, and images that belong to them: redo one stage, then what depends on it.
style = ("--set", "stages.prompts.style=An oil painting of {caption}")
run("stage", "prompts", "--redo", *style)
run("stage", "generate", "--stale", *style)
run("write", *style)

edited = builder.open_dataset(folder / "out").sql("select uid, image_prompt from samples where image_path is not null")
print(edited)
