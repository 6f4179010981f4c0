"""Work sets: SQL that is not what a stage needs is refused whole, choices take the rows meant, slices are exact."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.engine import coverage, states, workset
from builder.engine.counting import count_rows
from builder.engine.work import Choice, Counts, Work
from builder.engine.workset import Slice, cut
from builder.errors import ConfigError, ConflictError
from builder.progress import Talk
from builder.sources.tars.shards import TarShards
from builder.store.layout import Layout, RunFiles
from builder.table import commits, partitions, root_schema
from builder.table.origin import Origin
from builder.verbs.plan import make_plan
from builder.verbs.stage import run_stage
from conftest import Workspace, ingest_here, make_shard, make_workspace, samples
from support.planned import SQL, do, plan, rows_of, section, work_of
from support.stages import Base, Fails, Note, Options

Make = Callable[..., Workspace]
ALL = [(shard, row) for shard in ("00000000", "00000001") for row in range(8)]


@pytest.fixture
def layout(dataset: Workspace) -> Layout:
    """Two ingested shards of eight samples."""
    return dataset.load().layout


def frozen(layout: Layout, choice: Choice = Choice(), sql: str = SQL, stage: Base | None = None, **params: Any) -> Any:  # noqa: B008
    """The rows of a work set."""
    run = plan(layout, stage or Note(Options()), choice, sql, **params)
    slices = workset.read_task(run, 0) if run.task(0).exists() else []
    return rows_of(pa.concat_tables([workset.read_slice(run, part) for part in slices])) if slices else []


def count_of(layout: Layout, work: Work) -> Counts:
    [counts] = count_rows(layout, [work])
    return counts


def refusal(layout: Layout, sql: str, choice: Choice = Choice(), **params: Any) -> str:  # noqa: B008
    """The whole message with which planning and freezing refuse SQL; nothing is left behind."""
    with pytest.raises(ConfigError) as planned:
        count_rows(layout, [work_of(layout, Note(Options()), choice, sql, **params)])
    with pytest.raises(ConfigError) as refused:
        plan(layout, Note(Options()), choice, sql, **params)
    assert str(planned.value) == str(refused.value)
    assert [path.name for run in layout.runs.iterdir() for path in run.iterdir()] == []
    return str(refused.value)


# --- SQL that is refused ---


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (
            "select shard, row, uid, key from samples",
            "work SQL returned no column 'text', which stage 'note' needs\n"
            "  file: work.sql\n"
            "  returned: shard, row, uid, key\n"
            "  fix: add it, for example: select shard, row, uid, key, caption as text",
        ),
        (
            "select row, uid, key, caption as text from samples",
            "work SQL returned no column 'shard', which stage 'note' needs\n"
            "  file: work.sql\n"
            "  returned: row, uid, key, text\n"
            "  fix: add it, for example: select shard, row, uid, key, caption as text",
        ),
        (
            "select shard, row, uid, key, caption as text, caption from samples",
            "work SQL returned a column 'caption', which stage 'note' does not take\n"
            "  file: work.sql\n"
            "  returned: shard, row, uid, key, text, caption\n"
            "  fix: return exactly: shard, row, uid, key, text",
        ),
        (
            "delete from samples",
            "SQL must be exactly one SELECT, and this is: DELETE\n"
            "  file: work.sql\n"
            "  fix: write one query that begins with select or with",
        ),
        (
            f"{SQL} where row = $number",
            "SQL uses $number, which has no value\n"
            "  file: work.sql\n"
            "  values given: none\n"
            "  fix: add number = ... to the params of the pipeline; with builder sql: --param number=...",
        ),
    ],
)
def test_sql_that_is_not_what_the_stage_needs_is_refused(layout: Layout, sql: str, message: str) -> None:
    assert refusal(layout, sql) == message


def test_a_row_that_comes_twice_is_refused(layout: Layout) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(layout, Note(Options()), sql=f"{SQL} union all from ({SQL} where row = 3)")
    assert str(refused.value) == (
        "work SQL returns row 3 of shard '00000000' more than once\n"
        "  file: work.sql\n"
        "  fix: return each sample once: select distinct on (shard, row), or aggregate the join that repeats it"
    )


def test_a_parameter_that_is_not_used_is_refused(layout: Layout) -> None:
    assert refusal(layout, SQL, limit=3) == (
        "parameter 'limit' is given, but the SQL does not use $limit\n"
        "  file: work.sql\n"
        "  names in the SQL: none\n"
        "  fix: leave it out, or use it in the SQL"
    )
    assert frozen(layout, sql=f"{SQL} where row < $limit", limit=2) == [row for row in ALL if row[1] < 2]


@pytest.mark.parametrize("name", ["inputs", "previous_run", "source_changed"])
def test_an_input_with_the_name_of_a_column_of_the_work_set_is_refused(layout: Layout, name: str) -> None:
    class Clashing(Note):
        inputs = pa.schema([(name, pa.string())])

    with pytest.raises(ConfigError) as refused:
        plan(layout, Clashing(Options()), sql=f"select shard, row, uid, key as {name} from samples")
    assert str(refused.value) == (
        f"work SQL returned a column '{name}', which is the name of a column of the work set\n"
        "  file: work.sql\n"
        f"  returned: shard, row, uid, {name}\n"
        "  fix: give it another name, here and in the inputs of stage 'note'"
    )


def test_two_columns_of_one_name_are_refused(layout: Layout) -> None:
    assert refusal(layout, "select shard, row, uid, key, caption as text, key as text from samples") == (
        "SQL returns two columns with the same name in SQL: 'text' and 'text'\n"
        "  file: work.sql\n"
        "  returned: shard, row, uid, key, text, text\n"
        "  fix: give one of them another name, or leave it out"
    )


def test_sql_that_does_not_exist_is_refused(workspace: Make) -> None:
    made = workspace(stages=section("Note", "nowhere.sql"))
    ingest_here(made.load())
    done = made.run("stage", "note", check=False, cwd=made.folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: no SQL file 'nowhere.sql'"
    assert done.stderr.splitlines()[-1].startswith("  fix: write it, or name one that comes with builder:")


def test_values_that_do_not_fit_an_input_are_refused_with_duckdbs_words(layout: Layout) -> None:
    class Number(Base):
        inputs = pa.schema([("number", pa.int32())])

    with pytest.raises(ConfigError) as refused:
        plan(layout, Number(Options()), sql="select shard, row, uid, key as number from samples where uid like '%00'")
    what = "DuckDB refuses the SQL: Conversion Error: Could not convert string '0{31}[0-9a-f]-0' to INT32"
    assert re.match(what, str(refused.value))  # which row DuckDB comes to first is its own affair
    assert str(refused.value).endswith("\n  file: work.sql\n  fix: edit that SQL")


# --- SQL on its leash ---


@pytest.mark.parametrize(
    "text",
    [
        "with x as (copy (select 1) to '{target}' (use_tmp_file false)) select * from samples",
        "with x as (copy (select 1 as i) to '{target}') select * from samples, x",
        "copy samples to '{target}'",
        "select 1) to '{target}'; copy (select 1",
        "select * from samples) to '{target}' --",
        "attach '{target}' as other",
        "select 1; attach '{target}' as other",
        "export database '{target}'",
        "install httpfs",
        "load httpfs",
        "pragma database_list",
        "pragma enable_external_access = true",
        "set enable_external_access = true",
        "create table x as from samples",
        "select * from read_csv('{other}')",
        "select * from read_text('{other}')",
        "select * from read_parquet('{column_file}')",
        "select * from '{column_file}'",
        "select * from glob('{folder}/*')",
        "select * from json_execute_serialized_sql(json_serialize_sql('select 1'))",
        "select * from query('copy samples to ''{target}''')",
        "select * from sqlite_scan('{other}', 'x')",
        "select getenv('HOME') from samples",
    ],
)
def test_work_sql_can_read_the_table_and_do_nothing_else(dataset: Workspace, text: str) -> None:
    layout = dataset.load().layout
    partition = layout.partition("00000000")
    places = {
        "other": dataset.file, "folder": dataset.folder,
        "column_file": layout.column_file("00000000", "source", 1),
    }  # fmt: skip
    for target in (partition, dataset.folder / "new"):
        before = contents(dataset.folder)
        sql = text.format(target=target, **places)
        for choice in (Choice(), Choice(where=f"row in (select row from ({sql}))")):
            with pytest.raises(ConfigError):
                frozen(layout, choice, SQL if choice.where else sql)
        assert contents(dataset.folder) == before


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but those of runs and of the schema."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not {"runs", "schema"} & set(path.parts)
    }


# --- which rows ---


def test_a_work_set_is_sorted_and_says_what_it_was_planned_on(layout: Layout) -> None:
    run = plan(layout, Note(Options()), sql=f"{SQL} order by hash(uid)")
    found = pq.read_table(run.workset)
    assert found.column_names == ["shard", "row", "uid", "key", "text", "previous_run", "inputs", "source_changed"]
    assert rows_of(found) == ALL
    assert found["previous_run"].null_count == 16
    assert len(set(found["inputs"].to_pylist())) == 16
    assert [part.rows for part in workset.read_task(run, 0)] == [
        partitions.partition_state(layout, shard).rows for shard in ("00000000", "00000001")  # type: ignore[union-attr]
    ]  # fmt: skip
    do(layout, run, Note(Options()))
    again = pq.read_table(plan(layout, Note(Options()), Choice(redo=True)).workset)
    assert again["previous_run"].to_pylist() == [run.folder.name] * 16
    assert again["inputs"] == found["inputs"]


def test_rows_without_an_answer_are_tried_and_no_others(layout: Layout) -> None:
    do(layout, plan(layout, Note(Options()), sql=f"{SQL} where row < 3"), Note(Options()))
    stage = Fails(Options(bad=[f"{5:032x}-0"]))
    do(layout, plan(layout, stage, sql=f"{SQL} where row = 5"), stage)
    assert frozen(layout) == [row for row in ALL if row[1] in (3, 4, 6, 7)]
    assert count_of(layout, work_of(layout, Note(Options()))) == Counts(
        covered=16, todo=8, ok=7, failed=1, outside=0, shards=2
    )
    assert count_of(layout, work_of(layout, Note(Options()), sql=f"{SQL} where row = 0 or row > 6")) == Counts(
        covered=4, todo=2, ok=2, failed=0, outside=5, shards=2
    )


def test_rows_whose_source_failed_are_never_tried(workspace: Make) -> None:
    broken = samples(4)
    broken[2].json = b"{"
    made = workspace({"a": broken})
    ingest_here(made.load())
    assert frozen(made.load().layout) == [("a", 0), ("a", 1), ("a", 3)]
    assert count_of(made.load().layout, work_of(made.load().layout, Note(Options()))).covered == 3


@pytest.fixture
def mixed(layout: Layout) -> Layout:
    """Rows 0 to 3 of each shard ok, 4 failed with ValueError, 5 with KeyError, 6 and 7 not tried."""

    class Odd(Note):
        def check(self, batch: pa.RecordBatch) -> None:
            for row in batch.column("row").to_pylist():
                if row in (4, 5):
                    raise (ValueError if row == 4 else KeyError)("no")

    do(layout, plan(layout, Odd(Options()), sql=f"{SQL} where row < 6"), Odd(Options()))
    return layout


@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        (Choice(), [6, 7]),
        (Choice(retry="failed"), [4, 5, 6, 7]),
        (Choice(retry="failed:ValueError"), [4]),
        (Choice(retry="failed:Value"), []),
        (Choice(redo=True), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Choice(stale=True), [6, 7]),
        (Choice(where="row % 2 = 0"), [6]),
        (Choice(where="row % 2 = 0 -- a comment"), [6]),
        (Choice(where="key <> '{}' and row > 6"), [7]),
        (Choice(retry="failed", where="note_error like 'Key%'"), [5]),
        (Choice(redo=True, where="row < 2"), [0, 1]),
        (Choice(redo=True, where="false"), []),
    ],
)
def test_a_choice_takes_the_rows_meant(mixed: Layout, choice: Choice, rows: list[int]) -> None:
    assert frozen(mixed, choice) == [row for row in ALL if row[1] in rows]
    counts = count_of(mixed, work_of(mixed, Note(Options()), choice))
    assert (counts.todo, counts.shards) == (2 * len(rows), 2 if rows else 0)


def test_stale_rows_are_those_whose_inputs_version_or_options_changed(mixed: Layout) -> None:
    other = Note(Options(word="other"))
    assert frozen(mixed, Choice(stale=True), stage=other) == ALL
    changed = "select shard, row, uid, key, case when row = 2 then 'new' else caption end as text from samples"
    assert frozen(mixed, Choice(stale=True), changed) == [row for row in ALL if row[1] in (2, 6, 7)]
    assert count_of(mixed, work_of(mixed, Note(Options()), Choice(stale=True), changed)).todo == 6

    class Raised(Note):
        version = "2"

    assert frozen(mixed, Choice(stale=True), stage=Raised(Options())) == ALL


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "select 1; drop table x",
            "DuckDB refuses the SQL: Parser Error: syntax error",
        ),
        (
            "no_such_column > 3",
            'DuckDB refuses the SQL: Binder Error: Referenced column "no_such_column" not found',
        ),
        ("row < $limit", "SQL uses $limit, which has no value"),
    ],
)
def test_a_condition_that_is_none_is_refused_by_its_name(layout: Layout, where: str, message: str) -> None:
    told = refusal(layout, SQL, Choice(where=where))
    assert told.startswith(message)
    assert "\n  file: --where\n" in told


def test_limit_means_what_it_says(mixed: Layout) -> None:
    """Of the ten rows that the SQL covers, those without an answer are tried: a limit does not slide."""
    ordered = f"{SQL} order by shard, row limit 10"
    assert frozen(mixed, sql=ordered) == [("00000000", 6), ("00000000", 7)]
    assert frozen(mixed, Choice(retry="failed"), ordered) == [("00000000", row) for row in (4, 5, 6, 7)]
    assert frozen(mixed, Choice(where="shard = '00000001'", redo=True), ordered) == [("00000001", 0), ("00000001", 1)]


def test_a_limit_without_an_order_takes_the_first_rows_every_time(tmp_path: Path) -> None:
    """Threads read partitions at once: the second one's few rows are found long before the last ones of the first."""
    layout = Layout(tmp_path)
    columns = TarShards({}).columns
    root_schema.extend_schema(layout, columns)
    for shard, captions in {"a": ["no"] * 50_000 + ["yes"] * 3, "b": ["yes"] * 3}.items():
        values: dict[str, Any] = {
            "shard": [shard] * len(captions), "row": range(len(captions)), "caption": captions,
            "key": [str(row) for row in range(len(captions))], "source_status": ["ok"] * len(captions),
        }  # fmt: skip
        nothing = [None] * len(captions)
        content = pa.table({c.name: pa.array(values.get(c.name, nothing), c.type) for c in columns})
        commits.commit_source(layout, shard, Origin("a.tar", 1, 2, "reading"), lambda _, content=content: content)
        partitions.fold(layout, shard)
    for _ in range(10):
        found = frozen(layout, sql=f"{SQL} where caption like '%y%e%s%' limit 3")
        assert found == [("a", 50_000), ("a", 50_001), ("a", 50_002)]


def test_windows_and_joins_mean_what_they_say(mixed: Layout) -> None:
    last = (
        "select shard, row, uid, key, caption as text from samples"
        " qualify row_number() over (partition by shard order by row desc) = 1"
    )
    assert frozen(mixed, sql=last) == [("00000000", 7), ("00000001", 7)]
    joined = (
        "select a.shard, a.row, a.uid, a.key, b.caption as text from samples a"
        " join samples b on a.row = b.row and a.shard <> b.shard where a.row = 6"
    )
    run = plan(mixed, Note(Options()), sql=joined)
    assert pq.read_table(run.workset)["text"].to_pylist() == [
        "a man with a hat is standing in the street number 14", "a man with a hat is standing in the street number 6",
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["row, shard", "row desc", "shard desc, row", "shard, row desc", "hash(uid)"])
def test_sql_in_any_order_loses_no_row(layout: Layout, order: str) -> None:
    sql = f"{SQL} order by {order}"
    assert frozen(layout, sql=sql) == ALL
    assert frozen(layout, Choice(redo=True), sql) == ALL
    assert count_of(layout, work_of(layout, Note(Options()), sql=sql)) == Counts(16, 16, 0, 0, 0, 2)


@pytest.fixture(scope="module", params=[(1, 5000), (24, 4)], ids=["one shard", "24 shards"])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, int]:
    """A table that DuckDB reads in pieces, and how many rows it has."""
    shards, rows = request.param
    [one] = samples(1)
    made = make_workspace(
        tmp_path_factory.mktemp("many"),
        {f"{i:08d}": [replace(one, key=f"{i:04d}{row:06d}") for row in range(rows)] for i in range(shards)},
    )
    ingest_here(made.load())
    return made.load().layout, shards * rows


@pytest.mark.parametrize(
    ("where", "share"),
    [
        ("uid in (select uid from samples where row % 2 = 0)", 2),
        ("uid in (select s.uid from samples s, range(30))", 1),
        ("exists (select 1 from samples t, range(40) where t.uid = samples.uid and t.row % 4 = 0)", 4),
        ("uid in (select uid from samples where row < 3 union all from (select uid from samples union all"
         " select uid from samples))", 1),
    ],
)  # fmt: skip
def test_a_condition_with_a_subquery_loses_no_row(many: tuple[Layout, int], where: str, share: int) -> None:
    layout, count = many
    assert count_of(layout, work_of(layout, Note(Options()), Choice(where=where, redo=True))).todo == count // share
    assert len(frozen(layout, Choice(where=where))) == count // share


def test_a_condition_stays_in_its_brackets(layout: Layout) -> None:
    assert refusal(layout, SQL, Choice(where="true) order by (-row")).startswith("DuckDB refuses the SQL: Parser Error")


def test_a_row_that_comes_back_later_is_a_double_too(layout: Layout) -> None:
    with pytest.raises(ConfigError, match="row 3 of shard '00000000' more than once"):
        plan(layout, Note(Options()), sql=f"{SQL} union all ({SQL} where row = 3 and shard = '00000000')")


def test_shards_named_in_another_order_are_all_there(workspace: Make) -> None:
    made = workspace(stages="")
    ingest_here(made.load())
    shards = json.dumps([f"{made.folder}/source/0000000{i}.tar" for i in (1, 0)])
    pipeline = made.load(f"dataset.shards={shards}", "stages.lang={}")
    counts = make_plan(pipeline, Choice()).stages["lang"]
    assert (counts.covered, counts.todo, counts.shards) == (16, 16, 2)


def test_a_freeze_during_an_ingest_is_tried_again(dataset: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = dataset.load().layout
    real = workset._write
    again = [True]

    def write(*args: Any) -> list[Slice]:
        slices = real(*args)
        if again:
            again.pop()
            make_shard(dataset.folder / "source/00000001.tar", samples(3))
            ingest_here(dataset.load())
        return slices

    monkeypatch.setattr(workset, "_write", write)
    run = plan(layout, Note(Options()))
    assert rows_of(pq.read_table(run.workset)) == ALL[:8] + [("00000001", row) for row in range(3)]
    assert sorted(path.name for path in run.folder.iterdir()) == ["tasks", "workset.parquet"]


def test_a_freeze_during_endless_ingests_gives_up(dataset: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = workset._write
    count = [0]

    def write(*args: Any) -> list[Slice]:
        slices = real(*args)
        count[0] += 1
        make_shard(dataset.folder / "source/00000001.tar", samples(count[0]))
        time.sleep(0.01)
        ingest_here(dataset.load())
        return slices

    monkeypatch.setattr(workset, "_write", write)
    with pytest.raises(ConflictError) as told:
        plan(dataset.load().layout, Note(Options()))
    assert str(told.value) == (
        "shards were ingested again while the work set was frozen\n  fix: run the same command again"
    )


# --- slices and tasks ---


def slices(*counts: int) -> list[Slice]:
    found: list[Slice] = []
    for i, count in enumerate(counts):
        found.append(Slice(f"s{i}", sum(counts[:i]), count, "rows"))
    return found


@pytest.mark.parametrize(
    ("counts", "tasks", "dealt"),
    [
        ((), 2, []),
        ((5,), 3, [[0]]),
        ((1, 1, 1, 1), 2, [[0, 1], [2, 3]]),
        ((1, 1, 1, 1, 1, 1), 4, [[0], [1, 2], [3], [4, 5]]),
        ((10, 1, 1, 1), 2, [[0], [1, 2, 3]]),
        ((1, 1, 1, 10), 2, [[0, 1, 2], [3]]),
        ((100, 1, 1), 3, [[0], [1, 2]]),
        ((1, 1), 1, [[0, 1]]),
    ],
)
def test_whole_shards_are_dealt_neighbours_together(counts: Sequence[int], tasks: int, dealt: list[list[int]]) -> None:
    parts = slices(*counts)
    assert cut(parts, tasks) == [[parts[i] for i in task] for task in dealt]


def test_a_slice_is_read_across_row_groups(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (states, coverage, workset):
        monkeypatch.setattr(module, "READ_ROWS", 3)
    run = plan(layout, Note(Options()), sql=f"{SQL} where row <> 4")
    with pq.ParquetFile(run.workset) as file:
        assert file.num_row_groups >= 4
    parts = workset.read_task(run, 0)
    assert [(part.shard, part.first, part.count) for part in parts] == [("00000000", 0, 7), ("00000001", 7, 7)]
    for part in parts:
        found = workset.read_slice(run, part)
        assert rows_of(found) == [(part.shard, row) for row in (0, 1, 2, 3, 5, 6, 7)]
    assert rows_of(workset.read_slice(run, Slice("x", 5, 4, ""))) == [
        ("00000000", 6), ("00000000", 7), ("00000001", 0), ("00000001", 1),
    ]  # fmt: skip
    assert workset.read_slice(run, Slice("x", 5, 0, "")).num_rows == 0


def test_a_work_set_without_rows_has_no_tasks(layout: Layout) -> None:
    run = plan(layout, Note(Options()), sql=f"{SQL} where false")
    assert RunFiles.at(run.folder).workset.exists()
    assert not run.task(0).exists()


def test_shards_are_those_of_the_pipeline_that_the_table_has() -> None:
    assert workset.narrow_to(["c", "a", "x"], ["a", "b", "c"]) == ["c", "a"]


def test_a_class_without_failures_is_told_with_those_there_are(
    workspace: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class that is misspelt would look like nothing left to do."""
    made = workspace(stages=section("Fails", bad=f'["{1:032x}-0", "{2:032x}-0"]'))
    (made.folder / "note.sql").write_text("select shard, row, uid, key, caption as text from samples")
    monkeypatch.chdir(made.folder)
    ingest_here(made.load())
    pipeline = made.load()
    stage = pipeline.stages["note"].stage
    do(pipeline.layout, plan(pipeline.layout, stage), stage)
    assert run_stage(pipeline, "note", Choice(retry="failed:valueerror"), Talk()).counts == {}
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "note: no row asked for has failed with 'valueerror'; there are: ValueError (2)",
        "note: nothing to do (14 ok, 2 failed of 16 covered)",
    ]
