"""Work sets counted in one pass: SQL that looks at every row on its own is told from other SQL, and counts the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.engine import counting, coverage, workset
from builder.engine.counting import count_rows
from builder.engine.work import Choice
from builder.errors import ConfigError
from builder.stages.contract import columns_of
from builder.stages.finding import find
from builder.store.layout import Layout, installed
from builder.table.rowwise import rowwise
from builder.table.schema import IDENTITY, Column
from builder.verbs import works as pipeline_works
from builder.verbs.snapshot import Snapshot
from conftest import Workspace, make_shard, make_workspace, replace_everywhere, samples
from support.planned import SQL, section, work_of
from support.stages import Note, Options

STAGES = ("faces", "lang", "prompts", "generate", "check")
COLUMNS = ("shard", "row", "uid", "caption", "lang", "face_count", "face_scores", "source_digests")


@pytest.mark.parametrize(
    ("sql", "condition"),
    [
        ("select shard, row, uid, caption as text from samples", "true"),
        ("from samples select shard, row", "true"),
        ("select shard, row from samples where caption is not null", "(caption IS NOT NULL)"),
        ('select s."row", s.shard from Samples as S where s.face_count > 1', "(face_count > 1)"),
        ("select shard, row, if(lang = 'en', 1, 2) as one from samples where \"Lang\" = 'it''s'", "(Lang = 'it''s')"),
        ("select shard, row from samples where source_digests.image = 3", "(source_digests.image = 3)"),
        ("select shard, row from samples where list_max(face_scores) > 0.9", "(list_max(face_scores) > 0.9)"),
        ("select shard, row from samples where lang = $lang;", "(lang = $a_lang)"),
    ],
)
def test_a_condition_is_taken_out_of_sql_that_looks_at_every_row_alone(sql: str, condition: str) -> None:
    found = rowwise(sql, COLUMNS, {"lang": "en", "unused": 1}, "a")
    assert found is not None
    assert found.condition == condition
    assert found.params == ({"a_lang": "en"} if "$lang" in sql else {})


@pytest.mark.parametrize(
    "sql",
    [
        "select shard, row, max(uid) as uid from samples",
        "select shard, row, geomean(face_count) as text from samples",  # a macro over an aggregate
        "select shard, row, unnest([1, 2]) as text from samples",
        "select shard, row, row_number() over () as text from samples",
        "select shard, row, (select 1) as text from samples",
        "select distinct shard, row from samples",
        "select shard, row from samples limit 3",
        "select shard, row from samples order by uid",
        "select shard, row from samples group by all",
        "select shard, row from samples qualify row_number() over (partition by uid) = 1",
        "select shard, row from samples tablesample 10 rows repeatable (1)",
        "select shard, row from samples, samples b",
        "select shard, row from samples union all select shard, row from samples",
        "with samples as (select 'a' as shard, 1 as row) select shard, row from samples",
        "select shard, row from (select * from samples)",
        "select shard, row from samples where uid in (select uid from other)",
        "select shard, row, caption as text from samples where text is not null",  # the name of an output
        "select shard, row + 1 as row from samples",
        "select upper(shard) as shard, row from samples",
        "select row as shard, shard as row from samples",
        "select * from samples",
        "select columns('shard|row') from samples",
        "select shard, row from other",
        "select shard, row from samples as samples(a, b)",
        "select shard, row, list_transform([1, 2], lambda row: row + samples.row) as text from samples",
        "select shard, row from samples where list_contains([row + samples.row for row in [1, 2]], 4)",
        "select shard, row, alias(row) as text from samples",  # the name that the value gets
        f"select shard, row, {' || '.join(['uid'] * 99)} as text from samples",  # DuckDB writes no tree as deep
        f"select shard, row from samples where {' + '.join(['row'] * 99)} > 20",
        "select 1; select 2",
        "no sql",
    ],
)
def test_other_sql_has_no_condition(sql: str) -> None:
    assert rowwise(sql, COLUMNS, {}) is None


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Two shards of eight samples: some have an answer, some have failed, some are open, and three changed since."""
    folder = tmp_path_factory.mktemp("counted")
    sql = folder / "note.sql"
    sql.write_text(SQL, "utf-8")
    bad = [sample.key for sample in samples(16)][1::8]
    made = make_workspace(folder, stages=section("Fails", str(sql), bad=json.dumps(bad)))
    made.run("ingest")
    assert made.run("stage", "note", "--where", "row < 3 or row in (4, 5)", check=False).returncode == 3
    changed = samples(8)
    for row in (0, 1, 6):
        changed[row] = replace(changed[row], caption="another caption")
    make_shard(made.folder / "source" / "00000000.tar", changed)
    made.run("ingest")
    return made.load().layout


@pytest.mark.parametrize("where", [None, "row <> 1", "row in (select row from samples where shard = '00000001')"])
@pytest.mark.parametrize(
    "choice", [{}, {"retry": "failed"}, {"retry": "failed:ValueError"}, {"retry": "failed:OSError"}, {"redo": True}]
)
def test_one_pass_counts_what_many_passes_count(
    layout: Layout, choice: dict[str, Any], where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Choice(**choice, where=where)
    texts = [
        SQL,
        f"{SQL} where row < $first",
        f"{SQL} where row > $first",
        f"{SQL} where null",
        f"{SQL} where row = 99",
    ]
    works = [
        work_of(layout, Note(Options()), asked, text, **({"first": 2 + at} if "$first" in text else {}))
        for at, text in enumerate(texts)
    ]
    expected_runs: dict[str, Counter[str]] = {}
    with monkeypatch.context() as patch:
        replace_everywhere(patch, rowwise, lambda *_: None)
        expected = count_rows(layout, works, expected_runs)
    by_run: dict[str, Counter[str]] = {}
    with monkeypatch.context() as patch:
        patch.setattr(counting, "_counted", None)  # the many passes
        assert (count_rows(layout, works, by_run), by_run) == (expected, expected_runs)
    assert expected[0].ok > 0
    assert expected[0].out_of_date > 0
    assert sum(by_run["note"].values()) > 0


@pytest.mark.parametrize("where", [None, "row <> 1", "row in (select row from samples where shard = '00000001')"])
@pytest.mark.parametrize("choice", [{}, {"retry": "failed"}, {"redo": True}, {"stale": True}])
def test_one_pass_freezes_what_two_freeze(
    layout: Layout, choice: dict[str, Any], where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (
        "select s.shard, s.row, s.uid, if(s.row > $first, upper(s.key), key) as key, s.row::varchar || $tail as text "
        "from samples s where s.caption is not null or s.row < $first"
    )
    for sql, params in [(SQL, {}), (own, {"first": 3, "tail": "x"})]:
        work = work_of(layout, Note(Options()), Choice(**choice, where=where), sql, **params)
        with monkeypatch.context() as patch:
            replace_everywhere(patch, rowwise, lambda *_: None)
            expected = workset.first_rows(layout, work, 99)
        with monkeypatch.context() as patch:
            replace_everywhere(patch, coverage.side_by_side, None)  # the two passes
            found = workset.first_rows(layout, work, 99)
            slices = workset.freeze(layout, layout.root / "frozen.parquet", work)
        assert found.equals(expected)
        assert found.equals(pq.read_table(layout.root / "frozen.parquet"))
        assert sum(part.count for part in slices) == found.num_rows > 0


def test_columns_of_the_names_that_one_pass_uses_are_left_alone(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [Column(f"{name}_{at}", pa.bool_(), "source") for name in ("input", "is_covered") for at in range(3)]
    work = work_of(layout, Note(Options()), sql=f"{SQL} where row > 1")
    work = replace(work, columns=(*work.columns, *more))
    with monkeypatch.context() as patch:
        replace_everywhere(patch, rowwise, lambda *_: None)
        expected = count_rows(layout, [work, work]), workset.first_rows(layout, work, 99)
    counts, rows = count_rows(layout, [work, work]), workset.first_rows(layout, work, 99)
    assert counts == expected[0]
    assert counts[0].ok > 0
    assert rows.equals(expected[1])


def test_values_that_cannot_be_evaluated_are_told_with_their_file(layout: Layout) -> None:
    work = work_of(layout, Note(Options()), sql=SQL.replace("caption as text", "cast(caption as int)::text as text"))
    with pytest.raises(ConfigError, match="DuckDB refuses the SQL: Conversion Error") as refused:
        workset.freeze(layout, layout.root / "frozen.parquet", work)
    assert refused.value.where["file"] == "work.sql"


def test_an_error_of_a_late_row_is_told_with_its_file(layout: Layout) -> None:
    late = f"{SQL} where case when shard > '00000000' and row = 7 then error('late') else true end"
    for sql in (late, f"{late} order by row"):
        work = work_of(layout, Note(Options()), sql=sql)
        with pytest.raises(ConfigError, match="DuckDB refuses the SQL: Invalid Input Error: late") as refused:
            workset.freeze(layout, layout.root / "frozen.parquet", work)
        assert refused.value.where["file"] == "work.sql"


def test_sql_with_a_condition_and_other_sql_are_counted_side_by_side(layout: Layout) -> None:
    texts = [f"{SQL} order by row", SQL, f"{SQL} where row in (select 2)", f"{SQL} where row = 2"]
    works = [work_of(layout, Note(Options()), sql=text) for text in texts]
    found = count_rows(layout, works)
    assert [counts.covered for counts in found] == [16, 16, 2, 2]
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_plan_counts_the_runs_of_stages_that_are_counted_in_one_pass_and_of_others(
    workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    (tmp_path / "note.sql").write_text(f"{SQL} where row in (select 2)", "utf-8")
    made = workspace(stages=section("Note", str(tmp_path / "note.sql")) + "[stages.lang]\n")
    made.run("ingest")
    made.run("stage", "note")
    loaded = made.load()
    shards = loaded.layout.shard_names()
    works = [pipeline_works.work_of(Snapshot(loaded), name, Choice(), shards) for name in ("lang", "note")]
    by_run: dict[str, Counter[str]] = {}
    assert [counts.covered for counts in count_rows(loaded.layout, works, by_run)] == [16, 2]
    assert {name: list(runs.values()) for name, runs in by_run.items()} == {"lang": [], "note": [2]}


def test_a_condition_that_cannot_be_evaluated_is_told_with_its_file(layout: Layout) -> None:
    work = work_of(layout, Note(Options()), sql=f"{SQL} where cast(caption as int) > 1")
    with pytest.raises(ConfigError, match="DuckDB refuses the SQL: Conversion Error") as refused:
        count_rows(layout, [work_of(layout, Note(Options())), work])
    assert refused.value.where["file"] == "work.sql"


def test_all_sql_that_comes_with_the_stages_is_counted_in_one_pass() -> None:
    columns = {column.name for column in (*IDENTITY, *(one for name in STAGES for one in columns_of(find(name))))}
    for name in STAGES:
        text = (installed("sql") / f"{name}.sql").read_text("utf-8")
        assert rowwise(text, columns, {}) is not None, name
