"""A second kind of source, whose rows have no bytes at all, goes the whole way."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import pyarrow as pa
import pytest

from builder.config.problems import Problems
from builder.config.sections import DatasetSection
from builder.engine.in_hand import InHand, Verdict
from builder.errors import ConfigError
from builder.hybrid import select
from builder.sources import kinds
from builder.sources.base import Found, Read, Source
from builder.store.layout import Layout
from builder.table import partitions, schema
from builder.table.origin import Origin
from builder.table.schema import SOURCE, Column
from builder.table.sql_text import Sql
from conftest import STAGES, Workspace


class LinesSection(DatasetSection):
    """Files of text, one sample per line."""

    stand_ins: ClassVar[dict[str, Any]] = {"folder": "", "root": ""}
    folder: str


@dataclass(frozen=True)
class Lines(Source):
    """Every `*.txt` of a folder is a shard, every line of it a sample; there are no pictures."""

    kind: ClassVar[str] = "lines"
    setting: ClassVar[str] = "dataset.folder"
    version: ClassVar[str] = "1"
    changes: ClassVar[dict[str, str]] = {}
    has_hybrid_shards: ClassVar[bool] = False
    Options: ClassVar[type[DatasetSection]] = LinesSection

    folder: str

    @classmethod
    def from_options(cls, options: LinesSection, problems: Problems) -> Lines:
        return cls(options.folder)

    def to_json(self) -> dict[str, Any]:
        return {"folder": self.folder}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Lines:
        return cls(data["folder"])

    @property
    def columns(self) -> tuple[Column, ...]:
        return (*schema.IDENTITY, *schema.status_columns(SOURCE))

    def with_columns_of(self, columns: Iterable[Column]) -> Lines:
        return self

    def find(self) -> Found:
        return Found({path.stem: path for path in sorted(Path(self.folder).glob("*.txt"))}, [])

    def why_missing(self, path: Path) -> str:
        return "does not exist"

    def identify(self, path: Path) -> Origin:
        found = path.stat()
        return Origin(str(path), found.st_size, found.st_mtime_ns, "lines", self.version, kind=self.kind)

    def read(self, path: Path, shard: str, run: str) -> Read:
        lines = path.read_text("utf-8").splitlines()
        uids = [hashlib.md5(line.encode()).hexdigest() for line in lines]
        count = len(lines)
        known = {
            "shard": [shard] * count, "row": range(count), "key": uids, "uid": uids, "caption": lines,
            "source_members": [[]] * count,            "source_status": ["ok"] * count, "source_run": [run] * count,
        }  # fmt: skip
        arrays = {c.name: pa.array(known.get(c.name, [None] * count), c.type) for c in self.columns}
        return Read(pa.table(arrays), counts={"blank": sum(not line.strip() for line in lines)})

    def summary(self, counts: dict[str, int]) -> list[str]:
        return [f"{counts['blank']} lines are blank"] if counts.get("blank") else []

    def digests(self, path: Path, rows: pa.Table) -> None:
        return None

    @classmethod
    def opened(cls, layout: Layout, shard: str, origin: Origin) -> AbstractContextManager[None]:
        return nullcontext()


PIPELINE = """\
[dataset]
kind = "lines"
folder = "{folder}/texts"
root = "{folder}/out"

[run]
workers = 1

[stages.lang]

[stages.faces]

[stages.note]
python = "{stages}:Note"
sql = "{folder}/note.sql"

[stages.prompts]
sql = "{folder}/prompts.sql"

[stages.generate]
width = 64
height = 64
"""


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Two files of three lines, and a pipeline over them."""
    monkeypatch.setitem(kinds.KINDS, "lines", Lines)
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"texts/{name}.txt").write_text("".join(f"A photo of {n} dogs in {name}\n" for n in range(3)))
    (tmp_path / "note.sql").write_text("select shard, row, uid, key, caption as text from samples")
    (tmp_path / "prompts.sql").write_text("select shard, row, uid, caption as text from samples")
    file = tmp_path / "pipeline.toml"
    file.write_text(PIPELINE.format(folder=tmp_path, stages=STAGES))
    return Workspace(tmp_path, file)


def test_rows_without_bytes_go_the_whole_way(lines: Workspace) -> None:
    assert "ingest: 2 shards, 6 rows" in lines.run("ingest").stderr
    assert "note: 6 rows, 6 ok" in lines.run("stage", "note").stderr
    assert lines.run("stage", "lang").returncode == 0
    lines.run("stage", "faces")
    assert lines.rows("select distinct lang, note like 'seen: A photo%', len(source_members) from samples") == [
        ("en", True, 0)
    ]
    assert lines.rows("select distinct face_count, face_source, face_notes from samples") == [(None, "unknown", None)]
    assert partitions.partition_state(lines.load().layout, "a").source.kind == "lines"  # type: ignore[union-attr]
    plan = json.loads(lines.run("plan", "--json").stdout)
    assert (plan["ingest"]["todo"], plan["stages"]["note"]["todo"], plan["write"]["shards"]) == (0, 0, 0)
    assert json.loads(lines.run("status", "--json").stdout)["rows"] == 6
    nothing = "write: nothing to do (sources of the kind 'lines' have no hybrid shards)\n"
    assert lines.run("write").stderr == nothing
    assert not (lines.root / "shards").exists()
    proof = lines.run("verify")
    assert "sources of the kind 'lines' have no hybrid shards" in proof.stderr
    assert "prompts: 6 rows, 6 ok" in lines.run("run").stderr
    assert "nothing to do" in lines.run("run").stderr


@pytest.mark.parametrize("image", ["source", "jpg"])
def test_rows_without_pictures_get_new_ones(lines: Workspace, image: str) -> None:
    setting = ("--set", f"write.image={image}")
    told = lines.run("run", *setting).stderr
    assert "prompts: 6 rows, 6 ok" in told
    assert "generate: 6 rows, 6 ok" in told
    assert lines.rows("select distinct image_format, image_width, generate_error from samples") == [("jpg", 64, None)]
    status = json.loads(lines.run("status", *setting, "--json").stdout)
    assert (status["stages"]["generate"]["ok"], status["left_out"]) == (6, {})
    assert "6 rows of 2 shards" in lines.run("status", *setting).stdout
    plan = json.loads(lines.run("plan", *setting, "--json").stdout)
    assert (plan["stages"]["generate"]["todo"], plan["write"]["shards"]) == (0, 0)
    assert "write: " in lines.run("write", *setting).stderr
    assert "have no hybrid shards" in lines.run("verify", *setting).stderr
    [(uid,)] = lines.rows("select uid from samples where shard = 'b' and row = 1")
    assert lines.run("regen", uid, *setting, "--check").stdout.endswith("the same image, bit for bit\n")


def test_a_selected_sample_without_members_has_no_extensions(lines: Workspace) -> None:
    lines.run("ingest")
    layout, sql = lines.load().layout, Sql("select shard, row, uid from samples", "all")
    [of_a, _] = select.select(layout, Lines("").columns, ["a", "b"], sql, {})
    assert [select.extensions_of(row) for row in of_a.rows] == [(), (), ()]


def test_a_line_that_changes_is_read_again_and_answered_again(lines: Workspace) -> None:
    lines.run("run")
    (lines.folder / "texts/a.txt").write_text("A cat\nA photo of 1 dogs in a\n")
    told = lines.run("run").stderr
    assert "ingest: 1 shards, 2 rows, 1 changed" in told
    assert "note: 1 rows, 1 ok" in told
    assert lines.rows("select note from samples where shard = 'a' order by row") == [
        ("seen: A cat",), ("seen: A photo of 1 dogs in a",),
    ]  # fmt: skip


def test_messages_name_the_setting_of_the_kind(lines: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    lines.run("ingest")
    (lines.folder / "texts/a.txt").write_text("A cat\n\n")
    found = Found({"a": lines.folder / "texts/a.txt"}, [Path("gone.txt")])
    monkeypatch.setattr(Lines, "find", lambda self: found)
    monkeypatch.setattr(Lines, "read", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    told = lines.run("ingest", check=False).stderr
    assert "1 of the shards that dataset.folder names are not files: gone.txt (does not exist)\n" in told
    assert "1 shards of the table are gone from dataset.folder, their rows stay and are not written: b\n" in told
    assert "fix: put it back or take it out of dataset.folder, then run the same command again\n" in told


def test_counts_of_a_kind_are_reported_in_its_own_words(lines: Workspace) -> None:
    (lines.folder / "texts/a.txt").write_text("A cat\n\n")
    (lines.folder / "texts/b.txt").write_text("\n")
    assert "ingest: 2 shards, 3 rows in" in (told := lines.run("ingest").stderr)
    assert told.endswith("\n2 lines are blank\n")


def test_a_shard_in_which_the_process_died_names_no_setting_of_another_kind(
    lines: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InHand, "verdict", Mock(return_value=Verdict.FAILED))
    told = lines.run("ingest", check=False).stderr
    assert "the process died twice in this shard" in told
    assert "or take the shard out of the pipeline\n" in told
    assert "dataset.shards" not in told


def test_an_unknown_kind_is_reported(lines: Workspace) -> None:
    lines.file.write_text(lines.file.read_text().replace('kind = "lines"', 'kind = "line"'))
    with pytest.raises(ConfigError) as caught:
        lines.load()
    assert "unknown kind of source 'line'" in str(caught.value)
    assert "did you mean 'lines'?" in str(caught.value)


def test_a_root_of_a_kind_that_this_version_lacks(lines: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    lines.run("run")
    pipeline = lines.load()
    monkeypatch.delitem(kinds.KINDS, "lines")
    state = partitions.partition_state(pipeline.layout, "a")
    assert state is not None
    with pytest.raises(Exception, match="a source of kind 'lines', which this version does not know"):
        kinds.kind_of(state.source)
