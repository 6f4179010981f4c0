"""The Python API, and the same table read by tools that know nothing of builder."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest

import builder
from builder import open_dataset
from builder.dataset import Dataset
from builder.errors import BuilderError, ConfigError, ShardError
from conftest import Sample, Workspace, make_workspace, picture, samples

Make = Callable[..., Workspace]
Rows = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two shards that went the whole way, once for all tests here."""
    made = make_workspace(tmp_path_factory.mktemp("finished"))
    made.run("run")
    return made


def caught(question: Callable[[], object], kind: type[BuilderError] = ConfigError) -> str:
    with pytest.raises(kind) as found:
        question()
    return str(found.value)


# --- open ---


def test_public_names_are_there_and_sorted() -> None:
    assert builder.__all__ == sorted(builder.__all__)
    assert all(hasattr(builder, name) for name in builder.__all__)
    assert builder.open_dataset is open_dataset
    with pytest.raises(AttributeError, match="module 'builder' has no attribute 'nothing'"):
        _ = builder.nothing


def test_open_says_what_it_is(finished: Workspace) -> None:
    dataset = open_dataset(str(finished.root))
    assert repr(dataset) == f"builder.open_dataset('{finished.root}')"
    assert dataset.root == finished.root
    assert dataset.columns["row"] == "position of the sample in its shard, from 0"
    assert dataset.columns["image_width"] == "px"


def test_open_where_there_is_no_table(tmp_path: Path) -> None:
    assert caught(lambda: open_dataset(tmp_path / "none")) == (
        f"there is no table in '{tmp_path / 'none'}'\n  fix: name the folder of dataset.root, after builder ingest"
    )


# --- sql ---


def test_sql_gives_a_polars_frame(finished: Workspace) -> None:
    dataset = open_dataset(finished.root)
    answer = dataset.sql("select lang, count(*) as n, sum(face_count)::int as faces from samples group by 1; -- all")
    assert isinstance(answer, pl.DataFrame)
    assert answer.rows() == [("en", 16, 10)]
    few = dataset.sql(
        "select row from samples where shard = $shard and row < $query order by 1", shard="00000001", query=2
    )
    assert few["row"].to_list() == [0, 1]


def test_sql_of_types_that_are_not_plain(finished: Workspace) -> None:
    dataset = open_dataset(finished.root)
    [row] = dataset.sql(
        "select face_boxes, source_members[1].ext as ext, source_inputs from samples"
        " where shard = '00000000' and row = 1"
    ).rows(named=True)
    assert row["face_boxes"] == [[0.1, 0.1, 0.5, 0.9]]
    assert row["ext"] == "jpg"
    assert 0 <= row["source_inputs"] < 2**64


def test_sql_that_is_refused(finished: Workspace) -> None:
    dataset = open_dataset(finished.root)
    assert caught(lambda: dataset.sql("drop view samples")) == (
        "SQL must be exactly one SELECT, and this is: DROP\n  file: sql()\n"
        "  fix: write one query that begins with select or with"
    )
    assert caught(lambda: dataset.sql("select $lang")) == (
        "SQL uses $lang, which has no value\n  file: sql()\n  values given: none\n"
        "  fix: add lang = ... to the params of the pipeline; with builder sql: --param lang=..."
    )
    assert caught(lambda: dataset.sql("select caption::int from samples")).startswith(
        "DuckDB refuses the SQL: Conversion Error: Could not convert string"
    )


def test_sql_names_columns_of_stages_that_did_not_run(dataset: Workspace) -> None:
    answer = open_dataset(dataset.root).sql(
        "select count(*) as n, count(face_count) as faces, count(prompt) from samples"
    )
    assert answer.row(0) == (16, 0, 0)


# --- samples ---


def test_samples_is_the_table_in_tar_order(finished: Workspace) -> None:
    frame = open_dataset(finished.root).samples()
    assert isinstance(frame, pl.LazyFrame)
    table = frame.collect()
    assert table.select("shard", "row").rows() == [(f"{i:08d}", row) for i in (0, 1) for row in range(8)]
    assert table.columns == list(open_dataset(finished.root).columns)
    assert table.schema["face_boxes"] == pl.List(pl.List(pl.Float64))


def test_samples_of_partitions_that_lack_columns(dataset: Workspace) -> None:
    """One shard is folded after a stage came, the other before."""
    dataset.run("stage", "lang", "--where", "shard = '00000000'")
    table = open_dataset(dataset.root).samples().select("shard", "lang").collect()
    assert table.group_by("shard").agg(pl.col("lang").count()).sort("shard").rows() == [
        ("00000000", 8),
        ("00000001", 0),
    ]


def test_samples_of_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "schema").mkdir()
    assert caught(lambda: open_dataset(tmp_path).samples()) == (
        f"the table has no samples yet\n  root: {tmp_path}\n  fix: builder ingest"
    )
    assert open_dataset(tmp_path).sql("select count(*) from samples").row(0) == (0,)


# --- read_member ---


def test_members_by_uid_and_by_place(finished: Workspace) -> None:
    dataset = open_dataset(finished.root)
    assert dataset.read_member("image", uid=f"{9:032x}") == picture(9)
    assert dataset.read_member("jpg", shard="00000001", row=1) == picture(9)
    fields = json.loads(dataset.read_member("json", shard="00000001", row=1) or b"")
    assert fields["uid"] == f"{9:032x}"
    assert dataset.read_member("txt", shard="00000001", row=1) == fields["caption"].encode()
    assert dataset.read_member("npz", shard="00000001", row=1) is None


def test_the_generated_image_is_the_edit(finished: Workspace) -> None:
    dataset = open_dataset(finished.root)
    edited, plain = (dataset.read_member("edit", shard="00000000", row=row) for row in (1, 0))
    assert edited is not None
    assert edited[:2] == b"\xff\xd8"
    assert len(edited) == dataset.sql("select image_size from samples where shard = '00000000' and row = 1").item()
    assert plain is None


def test_samples_that_are_not_there(finished: Workspace) -> None:
    dataset: Dataset = open_dataset(finished.root)
    rest = f"  root: {finished.root}\n  found: none\n  fix: name one of sql('select uid, shard, row from samples')"
    assert caught(lambda: dataset.read_member("image", uid="nobody")) == f"uid 'nobody' names 0 samples\n{rest}"
    for place in ({"shard": "00000000", "row": 8}, {"shard": "00000000", "row": -1}, {"shard": "nothing", "row": 0}):
        message = caught(partial(dataset.read_member, "image", **place))  # type: ignore[arg-type]
        assert message == f"shard '{place['shard']}' row {place['row']} names 0 samples\n{rest}"
    assert caught(lambda: dataset.read_member("image", shard="00000000")) == (
        "read_member needs uid=, or shard= and row=\n  fix: for example: uid='0a1b...'"
    )


def test_a_uid_that_is_not_unique(workspace: Make) -> None:
    made = workspace({"a": [Sample("0", fields={"uid": "same"}), Sample("1", fields={"uid": "same"})]}, stages="")
    made.run("ingest")
    dataset = open_dataset(made.root)
    assert caught(lambda: dataset.read_member("image", uid="same")) == (
        f"uid 'same' names 2 samples\n  root: {made.root}\n  found: a row 0, a row 1\n  fix: give shard= and row="
    )
    assert dataset.read_member("image", shard="a", row=1) == picture()


def test_a_source_that_is_gone(workspace: Make) -> None:
    made = workspace({"a": samples(1)}, stages="")
    made.run("ingest")
    (made.folder / "source/a.tar").unlink()
    assert caught(lambda: open_dataset(made.root).read_member("image", shard="a", row=0), ShardError) == (
        f"the source shard cannot be read: No such file or directory\n  file: {made.folder}/source/a.tar\n"
        "  fix: put it back, or ingest it as it is now: builder ingest"
    )


# --- any tool ---

COLUMNS = [
    "uid",
    "shard",
    "row",
    "caption",
    "face_count",
    "face_boxes",
    "lang",
    "prompt",
    "image_size",
    "generate_status",
]


def plainly(value: Any) -> Any:
    """A value without the marks of the tool that read it: NaN and NaT are null, arrays lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [plainly(item) for item in value]
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() and value > 1 else value


def by_duckdb(root: Path) -> Rows:
    with duckdb.connect() as connection:
        sql = f"select {', '.join(COLUMNS)} from read_parquet('{root}/samples/*.parquet') order by shard, row"
        return connection.sql(sql).fetchall()


def by_polars(root: Path) -> Rows:
    return pl.scan_parquet(f"{root}/samples/*.parquet").select(COLUMNS).sort("shard", "row").collect().rows()


def by_pandas(root: Path) -> Rows:
    frame = pd.read_parquet(root / "samples", columns=COLUMNS).sort_values(["shard", "row"])
    return list(frame.itertuples(index=False, name=None))


def by_pyarrow(root: Path) -> Rows:
    table = (
        ds.dataset(root / "samples").to_table(columns=COLUMNS).sort_by([("shard", "ascending"), ("row", "ascending")])
    )
    return [tuple(row.values()) for row in table.to_pylist()]


@pytest.mark.parametrize("read", [by_duckdb, by_polars, by_pandas, by_pyarrow])
def test_bare_tools_read_the_same_rows(read: Callable[[Path], Rows], finished: Workspace) -> None:
    rows = [tuple(map(plainly, row)) for row in read(finished.root)]
    mine = open_dataset(finished.root).samples().select(COLUMNS).sort("shard", "row").collect()
    assert rows == [tuple(map(plainly, row)) for row in mine.rows()]
    caption = "a man with a hat is standing in the street number 1"
    assert rows[1][:7] == (f"{1:032x}", "00000000", 1, caption, 1, [[0.1, 0.1, 0.5, 0.9]], "en")
    assert rows[0][7:] == (None, None, None)
    assert len(rows) == 16


def test_bare_tools_see_only_partitions(finished: Workspace) -> None:
    """No temp file, no index and nothing hidden lies in the folder of the table."""
    assert sorted(path.name for path in (finished.root / "samples").iterdir()) == [
        "00000000.parquet",
        "00000001.parquet",
    ]


def test_every_answer_has_its_provenance(finished: Workspace) -> None:
    dataset = open_dataset(finished.root)
    [run] = dataset.sql("select distinct generate_run from samples where image_path is not null")["generate_run"]
    description = json.loads((finished.root / "runs" / run / "run.json").read_text())
    assert (description["stage"], description["version"], description["options"]["width"]) == ("generate", "1", 64)
    assert set(description["packages"]) >= {"duckdb", "numpy", "pillow", "pyarrow"}
    assert datetime.datetime.fromisoformat(description["started"]).tzinfo is not None
