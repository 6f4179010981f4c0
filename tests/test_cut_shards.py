"""Shards that were cut between two members, hold no sample or fewer than they should, and how they are told."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.hybrid.edit import Rules
from builder.hybrid.shard_plan import plan_shard
from builder.table import partitions
from builder.tar import indexing
from conftest import Workspace, picture, write_tar
from support.tars import END, by_webdataset, gnu_tar, pax, pax_record, record, written

FILES = [(f"{i}.{extension}", data) for i in range(4) for extension, data in (("jpg", picture()), ("txt", b"a dog"))]
GLOBAL = pax(pax_record(b"comment", b"made by git archive"), kind=b"g")
DROP_ALL = "select shard, row, uid, true as dropped from samples"
DROP_LAST = "select shard, row, uid, true as dropped from samples where row > 0"


def cut(path: Path, members: int) -> Path:
    """Cuts a shard behind so many of its members."""
    end = int(indexing.index(path).stop[members - 1])
    path.write_bytes(path.read_bytes()[:end])
    return path


@pytest.fixture
def one(workspace: Callable[..., Workspace]) -> Workspace:
    """A workspace with a shard `0` of four samples of two members."""
    made = workspace({}, stages="")
    write_tar(made.folder / "source" / "0.tar", FILES)
    return made


def chosen(made: Workspace, sql: str) -> str:
    """`--set` of a write SQL."""
    file = made.folder / "write.sql"
    file.write_text(sql)
    return f"write.select={file}"


def hybrid_of(made: Workspace, sql: str = "select shard, row, uid from samples") -> Path:
    """The hybrid shard, written and proven."""
    option = ("--set", chosen(made, sql))
    made.run("ingest")
    made.run("write", *option)
    made.run("verify", *option)
    return made.root / "shards" / "0.tar"


# --- cut between two members ---


def test_a_shard_that_was_cut_between_members_fails_its_last_sample(one: Workspace) -> None:
    cut(one.folder / "source" / "0.tar", 5)
    first = one.run("ingest", check=False)
    assert first.returncode == 3
    assert "shard '0': it has no end mark: it was cut, and what followed is lost" in first.stderr
    rows = one.rows("select source_status, source_error from samples order by row")
    assert [row[0] for row in rows] == ["ok", "ok", "failed"]
    assert rows[2][1].startswith("NoEndMark: the shard has no end mark")
    again = one.run("ingest", check=False)
    assert again.returncode == 0
    status = one.run("status", check=False)
    assert status.returncode == 0
    assert "NoEndMark" in status.stdout


@pytest.mark.parametrize("edits", [False, True])
def test_a_hybrid_of_a_cut_shard_is_closed_and_says_so(one: Workspace, edits: bool) -> None:
    source = cut(one.folder / "source" / "0.tar", 5)
    sql = "select shard, row, uid, 'new' as caption from samples where row = 0"
    option = ("--set", chosen(one, sql if edits else sql.replace("= 0", "< 0")))
    assert one.run("ingest", check=False).returncode == 3
    done = one.run("write", *option)
    assert "the sources of 1 shards have no end mark" in done.stderr
    hybrid = one.root / "shards" / "0.tar"
    assert hybrid.read_bytes().endswith(END)
    if not edits:
        assert hybrid.read_bytes().startswith(source.read_bytes())
    assert gnu_tar("tf", hybrid, folder=one.root)[-1] == "2.jpg"
    stats = json.loads((one.root / "shards" / "0_stats.json").read_text())
    assert stats == {"count": 3, "successes": 3, "edited": int(edits), "source_end_mark": False}
    info = json.loads(pq.read_schema(one.root / "shards/manifest/0.parquet").metadata[b"builder.output"])
    assert info["source_end_mark"] is False
    proof = one.run("verify", *option)
    assert "sources without end mark" in proof.stdout
    (one.root / "shards" / "0_stats.json").write_text(json.dumps({name: stats[name] for name in list(stats)[:3]}))
    assert "should say" in one.run("verify", *option, check=False).stderr


def test_a_hybrid_that_was_written_before_the_cut_was_known_is_written_again(one: Workspace) -> None:
    one.run("ingest")
    state = partitions.partition_state(one.load().layout, "0")
    assert state is not None
    known = replace(state, source=replace(state.source, end_mark=False))
    plans = [plan_shard(one.load().layout, "0", of, [], None, Rules()) for of in (state, known)]
    assert plans[0].digest != plans[1].digest


def test_a_whole_shard_says_nothing_of_its_end(one: Workspace) -> None:
    assert hybrid_of(one).read_bytes() == (one.folder / "source" / "0.tar").read_bytes()
    assert json.loads((one.root / "shards" / "0_stats.json").read_text()) == {"count": 4, "successes": 4, "edited": 0}


# --- how many samples there should be ---


def attempts(path: Path, *status: str) -> None:
    pq.write_table(pa.table({"status": list(status), "url": ["u"] * len(status)}), path)


def test_fewer_samples_than_the_statistics_beside_the_shard_say(one: Workspace) -> None:
    (one.folder / "source" / "0_stats.json").write_text('{"count": 9, "successes": 7}')
    attempts(one.folder / "source" / "0.parquet", *["success"] * 4)  # the statistics count
    done = one.run("ingest", check=False)
    assert done.returncode == 0
    assert "shard '0': it has 4 samples, and '0_stats.json' beside it says 7" in done.stderr
    assert "says 7" in one.rows("select source_notes from samples order by row")[3][0]
    assert "'0_stats.json' beside it says 7" in one.run("status", check=False).stdout


def test_fewer_samples_than_the_parquet_beside_the_shard_says(one: Workspace) -> None:
    attempts(one.folder / "source" / "0.parquet", *["success"] * 5, "failed_to_download")
    assert "it has 4 samples, and '0.parquet' beside it says 5" in one.run("ingest", check=False).stderr


@pytest.mark.parametrize("statistics", ['{"successes": 4}', '{"successes": "x"}', "[]", "{}"])
def test_statistics_that_agree_or_are_of_another_tool(one: Workspace, statistics: str) -> None:
    (one.folder / "source" / "0_stats.json").write_text(statistics)
    pq.write_table(pa.table({"uid": ["x"]}), one.folder / "source" / "0.parquet")
    assert "beside it" not in one.run("ingest", check=False).stderr


@pytest.mark.parametrize("statistics", ['{"successes": ', "[" * 100_000], ids=["cut", "deep"])
def test_statistics_that_cannot_be_read_are_told(one: Workspace, statistics: str) -> None:
    (one.folder / "source" / "0_stats.json").write_text(statistics)
    done = one.run("ingest", check=False)
    assert done.returncode == 0
    assert "'0_stats.json' beside it, which says how many samples it should have, cannot be read" in done.stderr


@pytest.mark.parametrize("status", [pa.array([200, 404]), pa.array([["success"], []])], ids=["numbers", "lists"])
def test_a_status_that_is_no_word_is_of_another_tool(one: Workspace, status: pa.Array) -> None:
    pq.write_table(pa.table({"status": status}), one.folder / "source" / "0.parquet")
    assert "beside it" not in one.run("ingest", check=False).stderr


def test_a_status_of_categories_is_read(one: Workspace) -> None:
    status = pa.array(["success"] * 5).dictionary_encode()
    pq.write_table(pa.table({"status": status}), one.folder / "source" / "0.parquet")
    assert "'0.parquet' beside it says 5" in one.run("ingest", check=False).stderr


def test_what_is_no_file_beside_a_shard_says_nothing(one: Workspace) -> None:
    os.mkfifo(one.folder / "source" / "0_stats.json")  # opening it would wait for a writer
    (one.folder / "source" / "0.parquet").mkdir()
    done = one.run("ingest", check=False)
    assert done.returncode == 0
    assert "beside it" not in done.stderr


# --- no sample ---


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([bytes(10240)], "it holds no member, only 10240 bytes of zeros"),
        ([GLOBAL, END], "it holds no member, only a global pax header"),
        ([record(b"README", b"x"), END], "none of its 1 members belongs to a sample, the first is 'README'"),
        ([record(b"README", b"x")], "it has no end mark"),
    ],
)
def test_a_shard_without_a_sample_is_told_as_such(one: Workspace, parts: list[bytes], said: str) -> None:
    written(one.folder / "source" / "1.tar", *parts)
    done = one.run("ingest", check=False)
    assert done.returncode == 0
    assert f"shard '1': {said}" in done.stderr
    assert "1 shards hold no sample: 1" in one.run("status", check=False).stderr


# --- global pax headers that no member follows ---


def readers_agree(path: Path, names: list[str]) -> None:
    with tarfile.open(path) as archive:
        assert archive.getnames() == names
    assert gnu_tar("tf", path, folder=path.parent) == names
    by_webdataset(path)


@pytest.mark.parametrize("between", [b"", GLOBAL])
def test_dropped_samples_leave_no_global_header_at_the_end(one: Workspace, between: bytes) -> None:
    samples = [record(b"0.jpg", picture()), between, record(b"1.jpg", picture()), between]
    written(one.folder / "source" / "0.tar", GLOBAL, *samples, END)
    readers_agree(hybrid_of(one, DROP_ALL), [])
    readers_agree(hybrid_of(one, DROP_LAST), ["0.jpg"])


def test_a_member_of_no_sample_keeps_the_global_header_before_it(one: Workspace) -> None:
    written(one.folder / "source" / "0.tar", GLOBAL, record(b"0.jpg", picture()), GLOBAL, record(b"README", b"x"), END)
    hybrid = hybrid_of(one, DROP_ALL)
    readers_agree(hybrid, ["README"])
    assert hybrid.read_bytes().count(b"git archive") == 2


@pytest.mark.parametrize("parts", [[GLOBAL, END], [record(b"0.jpg", picture()), GLOBAL, END]])
def test_a_source_that_ends_with_a_global_header(one: Workspace, parts: list[bytes]) -> None:
    written(one.folder / "source" / "0.tar", *parts)
    readers_agree(hybrid_of(one), ["0.jpg"] * (len(parts) == 3))
