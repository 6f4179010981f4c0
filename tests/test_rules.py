"""Answers of older versions: told by `plan` with their number and a command, and left as they are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from builder.sources.tars.shards import TarShards
from conftest import STAGES, Workspace, samples

Make = Callable[..., Workspace]
SQL = "select shard, row, uid, key, caption as text from samples"
STAGE = """\
import sys

sys.path.insert(0, {folder!r})
from support.stages import Note


class Note(Note):
    version = {version!r}
    changes = {changes!r}
"""


def with_version(made: Workspace, version: str, **changes: str) -> None:
    """The stage of the pipeline, as a release with another version has it."""
    named = {name.removeprefix("v"): sentence for name, sentence in changes.items()}
    text = STAGE.format(folder=str(STAGES.parent), version=version, changes=named)
    (made.folder / "own.py").write_text(text, "utf-8")


@pytest.fixture
def noted(workspace: Make, tmp_path: Path) -> Workspace:
    """A dataset whose eight samples version 1 of a stage has answered."""
    return answered(workspace, tmp_path, a=5, b=3)


def answered(workspace: Make, folder: Path, **rows: int) -> Workspace:
    """A dataset of shards with so many samples, which version 1 of a stage has answered."""
    (folder / "note.sql").write_text(SQL, "utf-8")
    stages = f'[stages.note]\npython = "{folder}/own.py:Note"\nsql = "{folder}/note.sql"\n'
    starts = itertools.accumulate(rows.values(), initial=0)
    shards = {name: samples(count, start=start) for (name, count), start in zip(rows.items(), starts, strict=False)}
    made = workspace(shards, stages=stages)
    with_version(made, "1")
    made.run("ingest")
    made.run("stage", "note")
    return made


def test_plan_tells_answers_of_older_versions_with_their_number_and_a_command(noted: Workspace) -> None:
    with_version(noted, "3", v2="blanks are trimmed", v3="emoji stay")
    assert json.loads(noted.run("plan", "--json").stdout)["older"] == [
        {
            "stage": "note", "version": "1", "count": 8, "changes": ["blanks are trimmed", "emoji stay"],
            "command": f"builder stage note --stale --pipeline {noted.file}",
        }
    ]  # fmt: skip
    shown = noted.run("plan").stdout
    assert "note: 8 rows were answered by version 1, and stay so until you ask:\n  now blanks are trimmed\n" in shown
    assert f"  builder stage note --stale --pipeline {noted.file}\n" in shown


def test_a_raised_version_starts_nothing_unasked(noted: Workspace) -> None:
    with_version(noted, "2", v2="blanks are trimmed")
    assert "note: nothing to do (8 ok, 0 failed of 8 covered)" in noted.run("stage", "note").stderr
    noted.run("stage", "note", "--stale", "--where", "shard = 'a'")
    assert [rule["count"] for rule in json.loads(noted.run("plan", "--json").stdout)["older"]] == [3]
    noted.run("stage", "note", "--stale")
    assert json.loads(noted.run("plan", "--json").stdout)["older"] == []


def test_each_answer_counts_once_where_the_sql_is_read_again_sorted(workspace: Make, tmp_path: Path) -> None:
    made = answered(workspace, tmp_path, a=5, b=3, c=2, d=1)
    with_version(made, "2", v2="blanks are trimmed")
    shuffled = " union all ".join(f"{SQL} where shard = '{shard}'" for shard in "abdc")
    (tmp_path / "note.sql").write_text(shuffled, "utf-8")
    assert [rule["count"] for rule in json.loads(made.run("plan", "--json").stdout)["older"]] == [11]
    in_b = json.loads(made.run("plan", "--json", "--where", "shard = 'b'").stdout)
    assert [rule["count"] for rule in in_b["older"]] == [3]


def test_answers_whose_run_is_gone_are_told_too(noted: Workspace) -> None:
    with_version(noted, "2", v2="blanks are trimmed")
    for run in (noted.root / "runs").iterdir():
        run.rename(noted.folder / run.name)
    [rule] = json.loads(noted.run("plan", "--json").stdout)["older"]
    assert (rule["version"], rule["count"]) == ("unknown", 8)


def test_shards_that_an_older_ingest_has_read_are_told_and_stay(
    noted: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = str(int(TarShards.version) + 1)
    monkeypatch.setattr(TarShards, "version", newer)
    monkeypatch.setattr(TarShards, "changes", {newer: "digits beyond 64 bits are kept"})
    assert "ingest: nothing to do (2 shards)" in noted.run("ingest").stderr
    shown = noted.run("plan").stdout
    assert "ingest: 2 shards were read by version " in shown
    assert f"  now digits beyond 64 bits are kept\n  builder ingest --redo --pipeline {noted.file}\n" in shown
    noted.run("ingest", "--redo")
    assert json.loads(noted.run("plan", "--json").stdout)["older"] == []
