"""Readers of hybrid shards: each gets the samples, and of each the members and pictures, that it gets of the source."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from conftest import CAPTION, PIPELINE, Workspace, members_like, write_tar
from support.tars import by_webdataset, gnu_tar

#: Of each kind of shard, what its samples consist of, in turn.
KINDS: dict[str, list[tuple[str, ...]]] = {
    "jpg": [("jpg", "json", "txt")],
    "jpeg": [("jpeg", "json", "txt")],
    "png": [("png", "json", "txt")],
    "webp": [("webp", "json", "txt")],
    "mixed": [("jpg", "json", "txt"), ("png", "json", "txt"), ("webp", "json", "txt")],
    "mixed-later": [*[("jpg", "json", "txt")] * 6, *[("png", "json", "txt"), ("webp", "json", "txt")] * 3],
    "no-json": [("png", "txt")],
    "no-txt": [("jpg", "json")],
    "class": [("cls", "jpg", "txt")],
    "capitals": [("JPG", "json", "txt")],
    "several": [("jpg", "mask.png", "txt")],
}
COUNT = 12
#: Faces, and so new pictures, are in these: behind the first five samples, from which `datasets` takes its columns.
EDITED = (7, 9, 11)
STAGES = """\
[stages.prompts]
sql = "{folder}/prompts.sql"

[stages.generate]
width = 64
height = 64

[write]
other_pictures = "keep"
"""
#: Prints what `datasets` gets of shards: of every sample its key, and of each column what is in it.
BY_DATASETS = """
import json, sys
import datasets
datasets.disable_progress_bars()
def told(value):
    return [value.mode, value.width > 0] if hasattr(value, "mode") else type(value).__name__
def read(path):
    try:
        found = datasets.load_dataset(
            "webdataset", data_files={"train": path}, split="train", cache_dir=path + "-cache"
        )
    except ValueError as error:
        return str(error)
    return [{n: v if n == "__key__" else told(v) for n, v in one.items() if n != "__url__"} for one in found]
print(json.dumps({path: read(path) for path in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A shard of every kind, written and proven."""
    folder = tmp_path_factory.mktemp("readers")
    for kind, made_of in KINDS.items():
        parts = [members_like(f"{n:04d}", *made_of[n % len(made_of)], number=n) for n in range(COUNT)]
        write_tar(folder / f"source/{kind}.tar", [member for part in parts for member in part])
    chosen = ", ".join(map(str, EDITED))
    (folder / "prompts.sql").write_text(
        f"select shard, row, uid, '{CAPTION}' as text from samples where row in ({chosen})"
    )
    made = Workspace(folder, folder / "pipeline.toml")
    stages = STAGES.format(folder=folder)
    made.file.write_text(PIPELINE.format(folder=folder, stages=stages, workers=1, checkpoint_rows=2048))
    made.run("run")
    made.run("verify")
    [(edited,)] = made.rows("select count(image_path) from samples")
    assert edited == len(KINDS) * len(EDITED)
    return made


def shards(made: Workspace, kind: str) -> tuple[Path, Path]:
    return made.folder / f"source/{kind}.tar", made.root / f"shards/{kind}.tar"


@pytest.mark.parametrize("kind", KINDS)
def test_gnu_tar_lists_the_members_of_the_source(hybrid: Workspace, kind: str) -> None:
    source, new = (gnu_tar("-tvf", path, "--full-time", folder=path.parent) for path in shards(hybrid, kind))
    assert [line.split()[-1] for line in new] == [line.split()[-1] for line in source]
    assert [line.split()[:2] + line.split()[3:5] for line in new] == [
        line.split()[:2] + line.split()[3:5] for line in source
    ]
    assert sum(one != other for one, other in zip(source, new, strict=True)) >= len(EDITED)


@pytest.mark.parametrize("kind", KINDS)
def test_webdataset_gets_the_samples_of_the_source(hybrid: Workspace, kind: str) -> None:
    source, new = (by_webdataset(path) for path in shards(hybrid, kind))
    assert [(key, list(found)) for key, found in new] == [(key, list(found)) for key, found in source]
    changed = [int(key) for (key, before), (_, after) in zip(source, new, strict=True) if before != after]
    assert changed == list(EDITED)
    for (_, before), (_, after) in zip(source, new, strict=True):
        for extension in set(before) - {"json", "txt", "cls"}:
            formats = {Image.open(io.BytesIO(found[extension])).format for found in (before, after)}
            assert len(formats) == 1, extension


@pytest.mark.parametrize("kind", [kind for kind, samples in KINDS.items() if len(samples) == 1])
def test_tuples_of_webdataset_are_whole(hybrid: Workspace, kind: str) -> None:
    """What a loader asks for that names the members it wants: a sample that lacks one ends it."""
    names = [extension.lower() for extension in KINDS[kind][0]]
    for path in shards(hybrid, kind):
        found = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False).decode("pil")
        tuples = list(found.to_tuple(*names))
        assert len(tuples) == COUNT and all(len(one) == len(names) for one in tuples)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_that_takes_whole_samples_alone_loses_none(hybrid: Workspace, kind: str) -> None:
    """As Megatron-Energon's loaders: a sample without a part that the dataset's description names is left out."""
    for wanted in set(KINDS[kind]):
        source, new = (
            [key for key, found in by_webdataset(path) if {one.lower() for one in wanted} <= set(found)]
            for path in shards(hybrid, kind)
        )
        assert new == source and new


@pytest.fixture(scope="module")
def by_datasets(hybrid: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `datasets` reads of every shard, in a process of its own, which never asks the network."""
    home = str(tmp_path_factory.mktemp("home"))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": home}
    paths = [str(path) for kind in KINDS for path in shards(hybrid, kind)]
    command = [sys.executable, "-c", BY_DATASETS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_gets_the_samples_of_the_source(hybrid: Workspace, kind: str, by_datasets: dict[str, Any]) -> None:
    source, new = (by_datasets[str(path)] for path in shards(hybrid, kind))
    assert len(source) == COUNT or kind == "mixed"  # of the first samples of which it refuses the source, too
    assert new == source
