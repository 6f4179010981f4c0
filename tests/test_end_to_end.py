"""The whole way on tiny shards: ingest, stages, write, verify; what is not edited stays bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Sample, Workspace, picture, read_tar, samples


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_run_edits_the_chosen_samples_and_nothing_else(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")
    assert made.run("verify").stdout.count("2 of 2") == 1
    for shard in ("00000000", "00000001"):
        source, hybrid = (
            read_tar(folder / f"{shard}.tar") for folder in (made.folder / "source", made.root / "shards")
        )
        assert list(hybrid) == list(source)
        for name, data in hybrid.items():
            has_face = int(name[:32], 16) % 3 != 0
            if not has_face:
                assert data == source[name], name
            elif name.endswith(".jpg"):
                assert data != source[name]
            elif name.endswith(".json"):
                fields, old = json.loads(data), json.loads(source[name])
                assert fields["original_caption"] == old["caption"]
                assert fields["caption"] == hybrid[name[:-5] + ".txt"].decode()
                assert (fields["width"], fields["height"], fields["original_width"], fields["original_height"]) == (
                    64, 64, 64, 64,
                )  # fmt: skip
                assert fields["sha256"] == hashlib.sha256(hybrid[name[:-5] + ".jpg"]).hexdigest()
                assert (fields["url"], fields["exif"]) == ("", "")
                assert "face_bboxes" not in fields
                assert fields["provenance"]["replaced"]["face_bboxes"] == [[0.1, 0.1, 0.5, 0.9]]
                assert fields["provenance"]["replaced"]["url"] == "https://example.org/a.jpg"
                assert set(fields["provenance"]) == {
                    "replaced", "model", "seed", "prompt", "stage", "version", "options",
                }  # fmt: skip
    assert json.loads((made.root / "shards/sizes.json").read_text()) == {"00000000.tar": 8, "00000001.tar": 8}


def test_edited_records_keep_mode_owner_and_time(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")

    def heads(path: Path) -> list[tuple[str, int, str, float]]:
        with tarfile.open(path) as archive:
            return [(info.name, info.mode, info.uname, info.mtime) for info in archive]

    assert heads(made.root / "shards/00000000.tar") == heads(made.folder / "source/00000000.tar")


def test_second_run_finds_nothing_to_do(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")
    before = {path: path.stat().st_mtime_ns for path in made.root.rglob("*") if path.is_file()}
    talk = made.run("run").stderr.splitlines()
    assert talk == [
        "ingest: nothing to do (2 shards)",
        "faces: nothing to do (16 ok, 0 failed of 16 covered)",
        "lang: nothing to do (16 ok, 0 failed of 16 covered)",
        "prompts: nothing to do (10 ok, 0 failed of 10 covered)",
        "generate: nothing to do (10 ok, 0 failed of 10 covered)",
        "write: nothing to do (2 hybrid shards up to date)",
    ]
    assert {path: path.stat().st_mtime_ns for path in made.root.rglob("*") if path.is_file()} == before


def test_same_table_gives_the_same_bytes(workspace: Callable[..., Workspace]) -> None:
    made = workspace(workers=2)
    made.run("run")
    first = digests(made.root / "shards")
    shutil.rmtree(made.root)
    made.run("run", "--set", "run.workers=1", "--set", "run.checkpoint_rows=3")
    assert digests(made.root / "shards") == first


def test_nothing_edited_is_the_source(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("ingest")
    made.run("write")
    assert digests(made.root / "shards") == digests(made.folder / "source")


def test_redone_prompts_without_new_images_change_no_byte(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")
    before = digests(made.root / "shards")
    other = ("--set", "stages.prompts.style=A painting of {caption}")
    made.run("stage", "prompts", "--redo", *other)
    assert made.run("write", *other).stderr.splitlines() == [
        "write: 10 images are older than their prompts: those samples keep the caption they were made from "
        f"(draw them again: builder stage generate --stale --pipeline {made.file} --set '{other[1]}')",
        "write: nothing to do (2 hybrid shards up to date)",
    ]
    assert digests(made.root / "shards") == before
    plan = json.loads(made.run("plan", "--json", *other).stdout)["write"]
    assert (plan["edited"], plan["stale"], plan["todo"]) == (10, 10, 0)
    made.run("verify", *other)
    shutil.rmtree(made.root / "shards")
    made.run("write", *other)
    assert digests(made.root / "shards") == before


def test_stale_images_are_drawn_again_and_no_other(workspace: Callable[..., Workspace]) -> None:
    made = workspace()
    made.run("run")
    before = dict(made.rows("select uid, generate_run from samples where image_path is not null"))
    style = ("--set", "stages.prompts.style=A painting of {caption}")
    made.run("stage", "prompts", "--redo", "--where", "row < 3", *style)
    assert json.loads(made.run("plan", "--stale", "--json", *style).stdout)["stages"]["generate"]["todo"] == 4
    made.run("stage", "generate", "--stale", *style)
    after = dict(made.rows("select uid, generate_run from samples where image_path is not null"))
    changed = {uid for uid in before if before[uid] != after[uid]}
    assert changed == {f"{i:032x}" for i in (1, 2, 8, 10)}
    made.run("write", *style)
    made.run("verify", *style)


def test_png_dropped_and_captionless_samples(workspace: Callable[..., Workspace]) -> None:
    made = workspace(
        {
            "a": [
                Sample("0-png", "a man with a hat is standing in the street", picture(1, extension="png"), "png",
                       {"face_bboxes": [[0, 0, 1, 1]]}),
                Sample("1-dropped", "a woman is standing in the street with a hat", picture(2)),
                Sample("2-empty", "", picture(3), fields={"face_bboxes": [[0, 0, 1, 1]]}),
            ]
        }
    )  # fmt: skip
    made.run("run")
    sql = made.folder / "write.sql"
    sql.write_text(
        "select shard, row, uid, key = '1-dropped' as dropped, image_path, image_offset, image_size, image_width,"
        " image_height, image_sha256, image_seed, image_model, image_prompt, prompt from samples"
        " where image_path is not null or key = '1-dropped'"
    )
    made.run("write", "--set", f"write.select={sql}")
    made.run("verify", "--set", f"write.select={sql}")
    source, hybrid = read_tar(made.folder / "source/a.tar"), read_tar(made.root / "shards/a.tar")
    assert list(hybrid) == ["0-png.png", "0-png.json", "0-png.txt", "2-empty.jpg", "2-empty.json", "2-empty.txt"]
    assert hybrid["0-png.png"][:4] == b"\x89PNG" and hybrid["0-png.png"] != source["0-png.png"]
    assert hybrid["2-empty.jpg"] == source["2-empty.jpg"]
    assert json.loads((made.root / "shards/a_stats.json").read_text())["successes"] == 2


def test_captions_alone_can_be_edited(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(3)})
    made.run("ingest")
    sql = made.folder / "write.sql"
    sql.write_text("select shard, row, uid, 'new: ' || caption as caption, 7 as set_rating from samples where row = 1")
    made.run("write", "--set", f"write.select={sql}")
    made.run("verify", "--set", f"write.select={sql}")
    source, hybrid = read_tar(made.folder / "source/a.tar"), read_tar(made.root / "shards/a.tar")
    key = f"{1:032x}-0"
    assert hybrid[f"{key}.jpg"] == source[f"{key}.jpg"]
    assert hybrid[f"{key}.txt"] == b"new: a man with a hat is standing in the street number 1"
    fields = json.loads(hybrid[f"{key}.json"])
    assert (fields["rating"], fields["url"]) == (7, "https://example.org/a.jpg")
    assert fields["provenance"] == {"replaced": {"caption": "a man with a hat is standing in the street number 1"}}
    assert [name for name in source if source[name] != hybrid[name]] == [f"{key}.json", f"{key}.txt"]


@pytest.mark.parametrize("form", ["gnu", "ustar", "long names"])
def test_other_tar_formats(workspace: Callable[..., Workspace], form: str) -> None:
    made_samples = samples(6)
    if form == "long names":
        for sample in made_samples:
            sample.key = "./" + "folder-é/" * 14 + sample.key
    options = {
        "gnu": {"form": tarfile.GNU_FORMAT, "mtime": 1_700_000_000},
        "ustar": {"form": tarfile.USTAR_FORMAT, "mtime": 1_700_000_000},
        "long names": {"form": tarfile.GNU_FORMAT, "mtime": 1_700_000_000},
    }[form]
    made = workspace({"a": made_samples}, **options)
    made.run("run")
    made.run("verify")
    source, hybrid = read_tar(made.folder / "source/a.tar"), read_tar(made.root / "shards/a.tar")
    assert list(source) == list(hybrid)
    assert sum(source[name] != hybrid[name] for name in source) == 4 * 3
