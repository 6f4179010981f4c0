"""Write selection, as another kind of output than hybrid shards uses it."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from builder.errors import BuilderError, ConfigError
from builder.hybrid import select
from builder.sources.reader import MemberReader
from builder.table.edits import EditsReader
from builder.table.sql_text import Sql, read_sql
from builder.verbs.pipeline import Pipeline
from builder.verbs.snapshot import Snapshot
from conftest import Workspace, read_tar

Make = Callable[..., Workspace]


# --- an export: selected samples as one parquet file a shard ---


def export(pipeline: Pipeline, sql: Sql, folder: Path) -> None:
    """Writes the selected samples of every shard with caption, members of the source and picture."""
    layout = pipeline.layout
    for found in select.select(layout, Snapshot(pipeline).known_columns, layout.shard_names(), sql, {}):
        samples = []
        with MemberReader(layout, found.shard, ["image", "json"]) as source, EditsReader(layout) as generated:
            for row in found.rows:
                picture, caption = source.read(row["row"], "image"), row.get("caption")
                if row.get("image_path") is not None:
                    picture = generated.read(row["image_path"], row["image_offset"], row["image_size"])
                    caption = row["image_prompt"]
                members = list(select.extensions_of(row))
                fields = {name: row[name] for name in row if name.startswith(select.SET)}
                samples.append(
                    {"uid": row["uid"], "caption": caption, "members": members, "picture": picture, **fields}
                )
        pq.write_table(pa.Table.from_pylist(samples), folder / f"{found.shard}.parquet")


def test_an_export_stands_on_the_selection_alone(workspace: Make) -> None:
    made = workspace()
    made.run("run")
    export(made.load(), read_sql("sql/write.sql"), made.folder)
    for shard in ("00000000", "00000001"):
        exported = pq.read_table(made.folder / f"{shard}.parquet").to_pylist()
        hybrid = read_tar(made.root / f"shards/{shard}.tar")
        manifest = pq.read_table(made.root / f"shards/manifest/{shard}.parquet").to_pylist()
        edited = [row["member"] for row in manifest if row["origin"] == "edited" and row["member"].endswith("jpg")]
        assert [hybrid[name] for name in edited] == [one["picture"] for one in exported] != []
        assert [hybrid[name.replace("jpg", "txt")].decode() for name in edited] == [one["caption"] for one in exported]
        assert {tuple(one["members"]) for one in exported} == {("jpg", "json", "txt")}
        assert {Image.open(io.BytesIO(one["picture"])).size for one in exported} == {(64, 64)}


def test_an_export_stays_small() -> None:
    [function] = [
        node
        for node in ast.parse(Path(__file__).read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "export"
    ]
    assert function.end_lineno is not None and function.end_lineno - function.lineno < 30


def test_it_knows_no_tars_no_splicing_and_no_manifests() -> None:
    """And nothing of what becomes of a sample: exports and the writer decide that."""
    names = set()
    for module in (select, select.image):
        assert module.__file__
        for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    of_hybrid = {name for name in names if name.startswith("builder.hybrid")}
    assert of_hybrid == {"builder.hybrid.image"}
    assert not [name for name in names if name.startswith(("builder.tar", "builder.sources"))]


# --- what a selection holds ---


def selected(made: Workspace, sql: str, **options: Any) -> list[select.Selection]:
    pipeline = made.load()
    shards = pipeline.layout.shard_names()
    return list(
        select.select(pipeline.layout, Snapshot(pipeline).known_columns, shards, Sql(sql, "a test"), {}, **options)
    )


def test_every_shard_has_a_selection_in_order_and_rows_ascend(dataset: Workspace) -> None:
    found = selected(
        dataset, "select row, SHARD, uid, 'c' as CAPTION, row / 2 as set_Half from samples where row > 5 order by -row"
    )
    assert [one.shard for one in found] == ["00000000", "00000001"]
    for one in found:
        assert [row["row"] for row in one.rows] == [6, 7]
        assert one.rows[0] == {
            "row": 6, "shard": one.shard, "uid": one.rows[0]["uid"], "caption": "c", "set_Half": 3.0,
            "source_status": "ok", "source_extensions": "jpg/json/txt",
        }  # fmt: skip
        assert select.extensions_of(one.rows[0]) == ("jpg", "json", "txt")
        assert one.row_schema.names == list(one.rows[0])
        assert one.state.source.path.endswith(f"{one.shard}.tar")


def test_a_shard_without_a_selected_row_is_there(dataset: Workspace) -> None:
    found = selected(dataset, "select shard, row, uid from samples where shard = '00000001'")
    assert [len(one.rows) for one in found] == [0, 8]


def test_images_come_with_their_run(workspace: Make) -> None:
    made = workspace()
    made.run("run")
    columns = ", ".join(select.image.NEEDED)
    [row, *_] = selected(made, f"select shard, row, uid, {columns} from samples where image_path is not null")[0].rows
    run = json.loads((made.root / "runs" / row["image_run"] / "run.json").read_text())
    assert (run["stage"], row["image_format"]) == ("generate", "jpg")


def test_rows_that_are_not_in_the_table_are_left_out(dataset: Workspace) -> None:
    sql = "select shard, row + 5 as row, uid from samples union all select 'z' as shard, 0 as row, 'u' as uid"
    assert [[row["row"] for row in one.rows] for one in selected(dataset, sql)] == [[5, 6, 7], [5, 6, 7]]


def test_a_row_twice_is_refused_with_its_shard(dataset: Workspace) -> None:
    sql = "select shard, row, uid from samples, range(2) where shard = '00000001' or range = 0"
    refused: dict[str, BuilderError] = {}
    assert [one.shard for one in selected(dataset, sql, refused=refused)] == ["00000000"]
    assert str(refused["00000001"]).startswith("write SQL returns row 0 of shard '00000001' more than once")
    with pytest.raises(ConfigError, match="more than once"):
        selected(dataset, sql)


def test_boxes_are_not_set_next_to_images(workspace: Make) -> None:
    made = workspace()
    made.run("run")
    sql = f"select shard, row, uid, {', '.join(select.image.NEEDED)}, 1 as set_retina from samples"
    assert selected(made, sql)
    with pytest.raises(ConfigError, match="returned 'set_retina', which the writer sets itself"):
        selected(made, sql, boxes=["retina"])
