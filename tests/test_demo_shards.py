"""The demo's shards: the layout that DataComp's resharder leaves, always the same bytes, and the faces they claim."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from builder.demo.shards import faces_placed, make_demo_shards
from builder.errors import ConfigError, StageError
from builder.models.faces.mtcnn import Mtcnn

FIELDS = [
    "uid", "caption", "url", "key", "status", "error_message",
    "width", "height", "original_width", "original_height", "exif", "sha256",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the demo, as it makes them."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo_shards(folder)
    return folder


def members(folder: Path) -> list[tuple[str, bytes]]:
    """Name and bytes of all members of both shards."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found.append((info.name, file.read()))
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(data) for name, data in members(folder) if name.endswith(".json")]


def truth(folder: Path) -> list[dict[str, str]]:
    lines = [line.split("\t") for line in (folder / "truth.tsv").read_text("utf-8").splitlines()]
    assert lines[0] == ["key", "photo", "faces", "lang"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_what_lies_in_the_folder(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000000.tar",
        "00000000_stats.json",
        "00000001.tar",
        "00000001_stats.json",
        "truth.tsv",
    ]
    assert (folder / "00000001_stats.json").read_text() == '{"successes": 100}'


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    one = make_demo_shards(tmp_path / "one", samples=20, seed=3)
    assert one == [tmp_path / "one" / "00000000.tar", tmp_path / "one" / "00000001.tar"]
    two = make_demo_shards(tmp_path / "two", samples=20, seed=3)
    other = make_demo_shards(tmp_path / "other", samples=20, seed=4)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert {uid["uid"] for uid in records(tmp_path / "one")}.isdisjoint(r["uid"] for r in records(tmp_path / "other"))
    assert other[0].read_bytes() != one[0].read_bytes()
    assert (tmp_path / "one" / "truth.tsv").read_bytes() == (tmp_path / "two" / "truth.tsv").read_bytes()


@pytest.mark.parametrize(("samples", "per_shard"), [(2, [1, 1]), (5, [2, 3]), (7, [3, 4])])
def test_any_number_of_samples(tmp_path: Path, samples: int, per_shard: list[int]) -> None:
    paths = make_demo_shards(tmp_path, samples=samples)
    assert [
        json.loads(path.with_name(f"{path.stem}_stats.json").read_text())["successes"] for path in paths
    ] == per_shard
    assert len(members(tmp_path)) == 3 * samples


def test_members_stand_together_sorted_by_extension(folder: Path) -> None:
    names = [name for name, _ in members(folder)]
    assert len(names) == 600
    extensions = Counter()
    for first in range(0, 600, 3):
        keys, kinds = zip(*(name.split(".") for name in names[first : first + 3]), strict=True)
        assert len(set(keys)) == 1
        extensions[kinds] += 1
    assert extensions == {("jpg", "json", "txt"): 196, ("json", "png", "txt"): 2, ("json", "txt", "webp"): 2}


def test_each_shard_has_one_png_and_one_webp(folder: Path) -> None:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            extensions = Counter(name.split(".")[1] for name in tar.getnames())
        assert extensions == {"jpg": 98, "png": 1, "webp": 1, "json": 100, "txt": 100}


def test_each_member_has_a_pax_header_with_its_mtime(folder: Path) -> None:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            infos = tar.getmembers()
        for info in infos:
            assert list(info.pax_headers) == ["mtime"]
            assert (info.mode, info.uname, info.gname, info.uid, info.gid) == (0o444, "bigdata", "bigdata", 0, 0)
            assert info.isreg()
    with tarfile.open(folder / "00000000.tar") as tar:
        assert [info.pax_headers["mtime"] for info in tar.getmembers()[:2]] == ["1719792000.25", "1719792000.2578125"]
    block = (folder / "00000000.tar").read_bytes()[:1024]
    assert block[156:157] == b"x"
    assert block[512:535] == b"23 mtime=1719792000.25\n"


def test_json_is_as_img2dataset_writes_it(folder: Path) -> None:
    by_name = dict(members(folder))
    for name, data in by_name.items():
        if not name.endswith(".json"):
            continue
        record = json.loads(data)
        assert list(record) == FIELDS
        assert data == json.dumps(record, indent=4).encode()
        assert data.isascii()
        assert name == f"{record['uid']}-0.json"
        assert record["caption"] == by_name[f"{record['uid']}-0.txt"].decode()
        assert (record["status"], record["error_message"]) == ("success", None)
        assert record["exif"] is None or isinstance(json.loads(record["exif"]), dict)


def test_uids_are_unique_and_keys_count_up(folder: Path) -> None:
    found = records(folder)
    uids = [record["uid"] for record in found]
    assert len(set(uids)) == 200
    assert all(len(uid) == 32 and set(uid) <= set("0123456789abcdef") for uid in uids)
    assert [found[i]["key"] for i in (0, 99, 100)] == ["000000000000", "000000000099", "000000010000"]


def test_sizes_are_true_and_in_range(folder: Path) -> None:
    by_name = dict(members(folder))
    formats = Counter()
    sides = set()
    for record in records(folder):
        kind = next(kind for kind in ("jpg", "png", "webp") if f"{record['uid']}-0.{kind}" in by_name)
        with Image.open(io.BytesIO(by_name[f"{record['uid']}-0.{kind}"])) as image:
            assert image.size == (record["width"], record["height"])
            formats[kind, image.format] += 1
        longest = max(record["width"], record["height"])
        assert 256 <= longest <= 512
        assert longest <= max(record["original_width"], record["original_height"])
        sides.add(longest)
    assert formats == {("jpg", "JPEG"): 196, ("png", "PNG"): 2, ("webp", "WEBP"): 2}
    assert len(sides) > 50


def test_sha256_is_of_the_source_photo(folder: Path) -> None:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None
    data = Path(spec.origin).parent / "data"
    by_key = {f"{record['uid']}-0": record["sha256"] for record in records(folder)}
    astronauts = {by_key[row["key"]] for row in truth(folder) if row["photo"] == "astronaut"}
    assert astronauts == {hashlib.sha256((data / "astronaut.png").read_bytes()).hexdigest()}


def test_a_quarter_shows_a_face_and_most_of_those_captions_are_english(folder: Path) -> None:
    rows = truth(folder)
    assert [row["key"] for row in rows] == [f"{record['uid']}-0" for record in records(folder)]
    assert faces_placed(folder) == 50
    faces = [row for row in rows if row["faces"] == "1"]
    assert Counter(row["photo"] for row in faces) == {"astronaut": 25, "camera": 25}
    assert sum(row["lang"] == "en" for row in faces) > 25
    assert len({row["photo"] for row in rows if row["faces"] == "0"}) == 8


def test_captions_are_in_many_languages(folder: Path) -> None:
    langs = Counter(row["lang"] for row in truth(folder))
    assert {"en", "de", "fr", "es", "it", "pt", "ru", "zh", "ja", "ar"} <= set(langs)
    assert langs[""] == 14


def test_some_captions_are_odd(folder: Path) -> None:
    captions = [record["caption"] for record in records(folder)]
    assert "" in captions
    assert "😀🚀✨" in captions
    assert "   " in captions
    assert any("\n" in caption and "\t" in caption and '"' in caption for caption in captions)
    assert any(len(caption) > 2000 for caption in captions)


def test_webdataset_reads_them(folder: Path) -> None:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in truth(folder)]
    assert json.loads(samples[0]["json"])["caption"] == samples[0]["txt"].decode()
    assert {kind for sample in samples for kind in sample if not kind.startswith("__")} == {
        "jpg",
        "png",
        "webp",
        "json",
        "txt",
    }


def test_the_detector_finds_the_faces_that_were_placed(tmp_path: Path) -> None:
    make_demo_shards(tmp_path, samples=48, seed=1)
    detector = Mtcnn(min_face_px=20)
    images = {name.split(".")[0]: data for name, data in members(tmp_path) if not name.endswith(("json", "txt"))}
    found = {}
    for key, data in images.items():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        boxes, scores = detector.detect(pixels)
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) if len(boxes) else np.zeros(0)
        found[key] = int(((scores >= 0.9) & (sides >= 0.03 * max(pixels.shape))).sum())
    assert found == {row["key"]: int(row["faces"]) for row in truth(tmp_path)}
    assert sum(found.values()) == faces_placed(tmp_path) == 12


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_demo_shards(tmp_path, samples=1)
    assert str(caught.value) == "the demo needs at least 2 samples, one per shard\n  fix: set samples = 200"
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_image_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(StageError) as caught:
        make_demo_shards(tmp_path)
    assert str(caught.value) == (
        "package 'scikit-image' is not installed, which builder demo needs\n"
        "  fix: pip install 'hybrid-shard-builder[demo]'"
    )


def test_a_folder_without_truth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        faces_placed(tmp_path)
    assert (
        str(caught.value)
        == f"no 'truth.tsv' next to the shards\n  folder: {tmp_path}\n  fix: make the demo's shards: builder demo"
    )
