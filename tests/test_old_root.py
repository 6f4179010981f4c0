"""A root of version 0.1.0 opens, goes on, and starts nothing unasked."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from conftest import Workspace
from support import old_root

STAGES = ("faces", "lang", "prompts", "generate", "check")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The root, with the SQL of its version in the working directory."""
    made = old_root.unpacked("0.1.0", tmp_path)
    monkeypatch.chdir(made.folder)
    return made


def answers(made: Workspace) -> set[str]:
    """Names of the column files, which a stage that starts again adds to."""
    return {str(path.relative_to(made.root)) for path in (made.root / "columns").rglob("*.parquet")}


def test_its_rows_can_be_asked(old: Workspace) -> None:
    counted = (
        "select shard, count(*), count(face_count), count(prompt), count(image_path) from samples group by 1 order by 1"
    )
    assert old.rows(counted) == [("jpg", 5, 5, 3, 3), ("odd", 7, 7, 4, 4), ("png", 4, 4, 3, 3)]


def test_no_shard_is_read_and_no_stage_starts_again_unasked(old: Workspace) -> None:
    before = answers(old)
    told = old.run("run").stderr
    assert "ingest: nothing to do (3 shards)" in told
    for stage in STAGES:
        assert f"{stage}: nothing to do" in told
    assert answers(old) == before
    plan = json.loads(old.run("plan", "--json").stdout)
    assert (plan["ingest"]["todo"], {name: counts["todo"] for name, counts in plan["stages"].items()}) == (
        0,
        dict.fromkeys(STAGES, 0),
    )


def test_only_shards_that_a_rule_changes_are_written_again(old: Workspace) -> None:
    """Its png and webp samples have jpg images; odd ones lack a json or a txt, and one has a second picture."""
    shards = old.root / "shards"
    before = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    plan = json.loads(old.run("plan", "--json").stdout)["write"]
    others = old.rows(
        "select count(*) from samples where image_path is not null and "
        "not list_has_any(list_transform(source_members, lambda m: lower(m.ext)), ['jpg', 'jpeg'])"
    )[0][0]
    assert (others, plan["kept"]) == (4, {"other format": 3, "several pictures": 1})
    assert 0 < plan["todo"] < len(before)
    told = old.run("write").stderr
    assert "write: 3 samples whose new picture has another format" in told
    old.run("verify")
    after = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    assert after["jpg.tar"] == before["jpg.tar"]
    assert after["png.tar"] == (old.folder / "source/png.tar").read_bytes()
    assert json.loads(old.run("plan", "--stale", "--json").stdout)["stages"]["generate"]["todo"] == others
    old.run("stage", "generate", "--stale")
    formats = "select distinct shard, image_format from samples where image_path is not null order by all"
    assert old.rows(formats) == [
        ("jpg", None), ("odd", "png"), ("odd", None), ("png", "png"), ("png", "webp"),
    ]  # fmt: skip
    assert json.loads(old.run("plan", "--json").stdout)["write"]["kept"] == {"several pictures": 1}
    old.run("write")
    assert "shards proven              3 of 3" in old.run("verify").stdout


def test_the_commands_that_plan_names_bring_it_up_to_date(old: Workspace) -> None:
    older = json.loads(old.run("plan", "--json").stdout)["older"]
    assert {(rule["stage"], rule["version"], rule["count"]) for rule in older} >= {
        ("ingest", "1", 3),
        ("lang", "1", 16),
    }
    for rule in older:
        assert rule["changes"]
        words = shlex.split(rule["command"])
        assert words[0] == "builder" and words[-2:] == ["--pipeline", str(old.file)]
        old.run(*words[1:-2])
    assert json.loads(old.run("plan", "--json").stdout)["older"] == []
    old.run("run")
    assert "shards proven              3 of 3" in old.run("verify").stdout


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A root of the second version of ingest and of its stages, made before modules moved into packages."""
    made = old_root.unpacked("0.1.0-2", tmp_path)
    monkeypatch.chdir(made.folder)
    return made


def test_a_root_from_before_the_packages_has_nothing_to_do(newer: Workspace) -> None:
    columns = answers(newer)
    tars = {path.name: path.read_bytes() for path in (newer.root / "shards").iterdir() if path.is_file()}
    plan = json.loads(newer.run("plan", "--stale", "--json").stdout)
    assert (plan["older"], plan["ingest"]["todo"], plan["write"]["todo"]) == ([], 0, 0)
    assert {name: counts["todo"] for name, counts in plan["stages"].items()} == dict.fromkeys(STAGES, 0)
    said = newer.run("run").stderr
    assert "ingest: nothing to do (3 shards)" in said
    assert "write: nothing to do (3 hybrid shards up to date)" in said
    for stage in STAGES:
        assert f"{stage}: nothing to do" in said
    assert "shards proven              3 of 3" in newer.run("verify").stdout
    assert newer.run("gc", "--dry-run").stderr.startswith("gc:")
    assert answers(newer) == columns
    assert {path.name: path.read_bytes() for path in (newer.root / "shards").iterdir() if path.is_file()} == tars


def test_a_root_from_before_the_packages_goes_on(newer: Workspace) -> None:
    """A changed option, a source that changed, and an image made again from its run."""
    assert "generate: 3 rows, 3 ok" in newer.run("stage", "generate", "--redo", "--where", "shard = 'jpg'").stderr
    [(uid,)] = newer.rows("select uid from samples where shard = 'odd' and image_path is not null order by row limit 1")
    assert "the same image, bit for bit" in newer.run("regen", uid, "--check").stdout
    source = newer.folder / "source/png.tar"
    source.touch()
    said = newer.run("run").stderr
    assert "ingest: 1 shards" in said
    assert "lang: nothing to do" in said
    assert "shards proven              3 of 3" in newer.run("verify").stdout
