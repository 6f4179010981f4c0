"""SQL: what comes with builder does what its header says, and no SQL of a pipeline can do more than read."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from builder.engine.work import Choice
from builder.errors import ConfigError
from builder.progress import Talk
from builder.stages.contract import columns_of
from builder.stages.faces import Faces, FacesOptions
from builder.stages.finding import built_in, find
from builder.store import layout
from builder.table import repeatable, schema
from builder.table.query import Samples
from builder.table.repeatable import examine
from builder.table.sql_text import Sql, batches, checked, read_sql
from builder.verbs.plan import make_plan
from builder.verbs.snapshot import Snapshot
from builder.verbs.sql import all_samples, answer
from builder.verbs.stage import run_stage
from builder.verbs.write import plan_write
from conftest import Workspace, ingest_here, metadata, samples, starts_in_ascii

FOLDER = layout.installed("sql")
FILES = sorted(path.name for path in FOLDER.glob("*.sql"))
STAGES = tuple(built_in())
KEYS = ["shard", "row", "uid"]
#: Files beside those of the stages, the writer and the statistics: what a stage takes instead of its own.
MORE = ("faces_metadata.sql", "generate_aspect.sql", "prompts_groups.sql")
PARAMS = {"min_faces": 1, "lang": "en", "source": "auto", "draw": 0}


def header(name: str) -> dict[str, list[str]]:
    """The parts of a file's header as lists of names."""
    lines = []
    for line in (FOLDER / name).read_text("utf-8").splitlines():
        if not line.startswith("-- "):
            break
        lines.append(line[3:])
    parts: dict[str, list[str]] = {}
    for line in lines:
        if match := re.match(r"(purpose|reads|returns|parameters):\s+(.*)", line):
            part = match[1]
            parts[part] = []
            line = match[2]
        parts[part] += [word.strip() for word in line.split(",") if word.strip()]
    return parts


def body(name: str) -> str:
    """The SQL without comments."""
    return re.sub(r"--.*", "", (FOLDER / name).read_text("utf-8"))


def params_of(name: str) -> dict[str, Any]:
    wanted = duckdb.extract_statements((FOLDER / name).read_text("utf-8"))[0].named_parameters
    return {key: PARAMS[key] for key in wanted}


def test_there_is_a_file_for_every_stage_the_writer_and_the_statistics() -> None:
    assert sorted([*(f"{stage}.sql" for stage in (*STAGES, "write", "stats")), *MORE]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_header_is_whole(name: str) -> None:
    assert list(header(name)) == ["purpose", "reads", "returns", "parameters"]


@pytest.mark.parametrize("name", FILES)
def test_it_reads_what_its_header_says(name: str) -> None:
    columns = {column.name for stage in STAGES for column in columns_of(find(stage))}
    columns |= {column.name for column in (*schema.IDENTITY, *schema.status_columns("source"))}
    words = set(re.findall(r"\w+", re.sub(r"'[^']*'", "", re.sub(r"\bas \w+", "", body(name)))))
    assert sorted(set(header(name)["reads"])) == sorted((words & columns) - set(KEYS))


@pytest.mark.parametrize("name", FILES)
def test_it_takes_the_parameters_that_its_header_says(name: str) -> None:
    said = [] if header(name)["parameters"] == ["none"] else header(name)["parameters"]
    assert sorted(said) == sorted(f"${key}" for key in params_of(name))


@pytest.mark.parametrize("name", FILES)
def test_it_runs_and_returns_what_its_header_says(name: str, dataset: Workspace) -> None:
    """On a table that no stage has worked on: columns of later stages read as nulls."""
    files = str(metadata(dataset.folder / "published.parquet", {f"{i:032x}": [[0, 0, 1, 1]] for i in range(4)}))
    pipeline = dataset.load()
    lookups = Faces(FacesOptions(metadata=files)).lookups
    with Samples(pipeline.layout, Snapshot(pipeline).known_columns, pipeline.layout.partitions(), lookups) as asked:
        names = list(asked.select(read_sql(name), params_of(name)).columns)
        rows = asked.rows(read_sql(name), params_of(name))
    assert names == header(name)["returns"]
    covered = {
        "faces.sql": 16,
        "faces_metadata.sql": 16,
        "check.sql": 0,
        "lang.sql": 16,
        "prompts.sql": 0,
        "prompts_groups.sql": 0,
        "generate.sql": 0,
        "write.sql": 0,
    }
    if name in covered:
        assert len(rows) == covered[name]


@pytest.mark.parametrize(("stage", "name"), [*((s, f"{s}.sql") for s in STAGES), ("faces", "faces_metadata.sql")])
def test_work_sql_returns_the_inputs_of_its_stage(stage: str, name: str) -> None:
    assert header(name)["returns"] == [*KEYS, *find(stage).inputs.names]


@pytest.mark.parametrize("name", ["generate.sql", "generate_aspect.sql"])
def test_the_next_draw_is_the_first_of_a_sample_that_was_never_tried(name: str) -> None:
    with duckdb.connect() as connection:
        connection.execute(
            "create table samples as select * from "
            "(values (0, null, null), (1, 0, 'ok'), (2, 4, 'ok'), (3, null, 'failed')) "
            "t(row, image_draw, generate_status), "
            "(select 'a' as shard, 'u' as uid, 'k' as key, 'p' as prompt, 1 as source_width, 1 as source_height)"
        )
        sql = (FOLDER / name).read_text("utf-8")
        found = [
            connection.execute(f"select row, draw from ({sql}) order by 1", {"draw": n}).fetchall() for n in (0, 1)
        ]
    assert found == [[(0, 0), (1, 0), (2, 4), (3, 0)], [(0, 0), (1, 1), (2, 5), (3, 1)]]


def test_statistics_of_a_fresh_and_of_a_finished_dataset(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(4)})
    ingest_here(made.load())
    fresh = answer(made.load(), read_sql("stats.sql"), {})[1]
    assert fresh == [
        ("rows", "all", 4, 1.0),
        ("faces", "unknown", 4, 1.0),
        ("language", "not computed", 4, 1.0),
        ("caption length", "50 to 99", 4, 1.0),
        ("stage check", "not tried", 4, 1.0),
        ("stage faces", "not tried", 4, 1.0),
        ("stage generate", "not tried", 4, 1.0),
        ("stage lang", "not tried", 4, 1.0),
        ("stage prompts", "not tried", 4, 1.0),
        ("stage source", "ok", 4, 1.0),
        ("edited", "new image", 0, 0.0),
        ("edited", "of these, older than its prompt", 0, 0.0),
    ]
    made.run("run")
    done = answer(made.load(), read_sql("stats.sql"), {})[1]
    assert done == [
        ("rows", "all", 4, 1.0),
        ("faces", "0", 2, 0.5),
        ("faces", "1", 2, 0.5),
        ("language", "en", 4, 1.0),
        ("caption length", "50 to 99", 4, 1.0),
        ("stage check", "not tried", 4, 1.0),
        ("stage faces", "ok", 4, 1.0),
        ("stage generate", "not tried", 2, 0.5),
        ("stage generate", "ok", 2, 0.5),
        ("stage lang", "ok", 4, 1.0),
        ("stage prompts", "not tried", 2, 0.5),
        ("stage prompts", "ok", 2, 0.5),
        ("stage source", "ok", 4, 1.0),
        ("edited", "new image", 2, 0.5),
        ("edited", "of these, older than its prompt", 0, 0.0),
    ]


def test_statistics_of_many_faces_and_of_no_rows(workspace: Callable[..., Workspace]) -> None:
    many = samples(1)
    many[0].fields["face_bboxes"] = [[0.1, 0.1, 0.5, 0.9]] * 7
    made = workspace({"a": many}, stages="[stages.faces]\n")
    _, rows = answer(made.load(), read_sql("stats.sql"), {})
    assert rows == [
        ("rows", "all", 0, None),
        ("edited", "new image", 0, None),
        ("edited", "of these, older than its prompt", 0, None),
    ]
    made.run("run")
    assert ("faces", "5 or more", 1, 1.0) in answer(made.load(), read_sql("stats.sql"), {})[1]


# --- pipelines without some of the built-in stages ---


def test_a_pipeline_without_stages_writes_its_source(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(2)}, stages="")
    made.run("run")
    assert (made.root / "shards/a.tar").read_bytes() == (made.folder / "source/a.tar").read_bytes()
    assert made.rows("select face_count, lang, prompt, image_path, generate_status from samples limit 1") == [
        (None,) * 5
    ]


def test_work_sql_names_no_column_that_nobody_will_compute(workspace: Callable[..., Workspace]) -> None:
    made = workspace({"a": samples(2)}, stages="[stages.prompts.params]\nmin_faces = 1\nlang = 'en'\n")
    ingest_here(made.load())
    done = made.run("stage", "prompts", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        'error: DuckDB refuses the SQL: Binder Error: Referenced column "face_count" not found in FROM clause!'
    )
    assert done.stderr.splitlines()[-1] == "  fix: edit that SQL"


# --- files ---


def test_sql_is_looked_up_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_sql("sql/lang.sql").origin == str(FOLDER / "lang.sql")
    Path("sql").mkdir()
    Path("sql/lang.sql").write_bytes(b"\xef\xbb\xbfselect 1")
    assert read_sql("sql/lang.sql") == read_sql("lang.sql") == Sql("select 1", "sql/lang.sql")
    Path("lang.sql").write_text("select 2")
    assert read_sql("lang.sql") == Sql("select 2", "lang.sql")


def test_no_such_sql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_sql("sql/mine.sql")
    assert str(caught.value) == (
        f"no SQL file 'sql/mine.sql'\n  looked at: sql/mine.sql, {FOLDER / 'mine.sql'}\n"
        "  fix: write it, or name one that comes with builder: check.sql, faces.sql, faces_metadata.sql, generate.sql, "
        "generate_aspect.sql, lang.sql, prompts.sql, prompts_groups.sql, stats.sql, write.sql"
    )
    with pytest.raises(ConfigError, match=r"no SQL file 'sql/prompt\.sql'") as caught:
        read_sql("sql/prompt.sql")
    assert caught.value.fix == "did you mean 'prompts.sql'?"


def test_sql_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.sql"
    path.write_bytes(b"select '\xe9'")
    with pytest.raises(ConfigError) as caught:
        read_sql(str(path))
    assert str(caught.value) == f"the SQL is not UTF-8 text\n  file: {path}\n  byte: 8\n  fix: save it as UTF-8"


# --- one SELECT ---


@pytest.mark.parametrize(
    "text",
    [
        "select 1 as a, ';' as b",
        "select 1 as a, ';' as b;",
        "select 1 as a, ';' as b ; ;",
        "select 1 as a, ';' as b; -- so; it is",
        "-- first; this\nselect 1 as a, /* ; */ ';' as b -- last\n;\n/* the; end */",
        "with x as (select 1 as a) select a, ';' as b from x;--",
        "select 1 as a, $$;$$ as b;",
        "values (1, ';');",
    ],
)
def test_one_select_with_semicolons_and_comments(text: str, dataset: Workspace) -> None:
    assert answer(dataset.load(), Sql(text, "here"), {})[1] == [(1, ";")]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", "nothing"),
        ("-- only a comment", "nothing"),
        ("select 1; select 2", "SELECT, SELECT"),
        ("select 1; drop view samples", "SELECT, DROP"),
        ("copy samples to 'x.csv'", "COPY"),
        ("attach 'x.db'", "ATTACH"),
        ("set enable_external_access = true", "SET"),
        ("create table x as select 1", "CREATE"),
        ("install httpfs", "LOAD"),
        ("select * from json_execute_serialized_sql('{}')", "json_execute_serialized_sql"),
        ("select * from \"JSON_execute_serialized_sql\"('{}')", "json_execute_serialized_sql"),
    ],
)
def test_anything_but_one_select_is_refused(text: str, kinds: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(Sql(text, "here"), {})
    assert str(caught.value) == (
        f"SQL must be exactly one SELECT, and this is: {kinds}\n  file: here\n"
        "  fix: write one query that begins with select or with"
    )


def test_parameters_are_all_given_and_all_used() -> None:
    sql = Sql("select $a, $b", "here")
    checked(sql, {"a": 1, "b": 2})
    with pytest.raises(ConfigError) as caught:
        checked(sql, {"a": 1})
    assert str(caught.value) == (
        "SQL uses $b, which has no value\n  file: here\n  values given: a\n"
        "  fix: add b = ... to the params of the pipeline; with builder sql: --param b=..."
    )
    with pytest.raises(ConfigError) as caught:
        checked(sql, {"a": 1, "b": 2, "c": 3})
    assert str(caught.value) == (
        "parameter 'c' is given, but the SQL does not use $c\n  file: here\n  names in the SQL: $a, $b\n"
        "  fix: leave it out, or use it in the SQL"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nselec 1",
            'DuckDB refuses the SQL: Parser Error: syntax error at or near "selec"\n  LINE 2: selec 1\n'
            "          ^^^^^\n  file: here\n  fix: edit that SQL",
        ),
        (
            "select no_such_function(1)\nfrom samples",
            "DuckDB refuses the SQL: Catalog Error: Scalar Function with name no_such_function does not exist!",
        ),
        (
            "select uid,\n       cast(caption as integer)\nfrom samples",
            "DuckDB refuses the SQL: Conversion Error: Could not convert string 'a man with a hat is standing in the "
            "street number ",  # which row it comes to first is its own affair
        ),
    ],
)
def test_what_duckdb_says_with_the_lines_of_the_text(text: str, message: str, dataset: Workspace) -> None:
    with pytest.raises(ConfigError) as caught:
        answer(dataset.load(), Sql(text, "here"), {})
    told = str(caught.value)
    assert told.startswith(message)
    assert told.endswith("\n  file: here\n  fix: edit that SQL")
    lines = [line for line in told.splitlines() if line.startswith("  LINE ")]
    assert [text.splitlines()[int(re.findall(r"\d+", line)[0]) - 1] in line for line in lines] in ([], [True])
    assert "\n\n" not in told


# --- the leash ---


@pytest.mark.parametrize(
    "text",
    [
        "with x as (copy (select 1) to '{target}' (use_tmp_file false)) select * from x",
        "select 1) to '{target}'; copy (select 1",
        "select * from (copy samples to '{target}')",
        "from query('copy samples to ''{target}''')",
    ],
)
def test_sql_cannot_write(text: str, dataset: Workspace) -> None:
    partition = dataset.root / "samples/00000000.parquet"
    before = partition.read_bytes()
    for target in (partition, dataset.folder / "new.csv"):
        with pytest.raises(ConfigError):
            answer(dataset.load(), Sql(text.format(target=target), "here"), {})
    assert partition.read_bytes() == before
    assert not (dataset.folder / "new.csv").exists()


@pytest.mark.parametrize("reader", ["read_text", "read_csv", "read_blob", "glob", "read_json_auto", "parquet_metadata"])
def test_sql_cannot_read_other_files(reader: str, dataset: Workspace) -> None:
    names = ("pipeline.toml", "out/columns/00000000/source.g000001.parquet", "out/schema/g000001.json", "out/samples/*")
    for other in (dataset.folder / name for name in names):
        with pytest.raises(ConfigError) as caught:
            answer(dataset.load(), Sql(f"select * from {reader}('{other}')", "here"), {})
        assert "file system operations are disabled by configuration" in str(caught.value)
    known = f"select count(*) from read_parquet('{dataset.root / 'samples/00000000.parquet'}')"
    assert answer(dataset.load(), Sql(known, "here"), {})[1] == [(8,)]


@pytest.mark.parametrize(
    "statement",
    [
        "set enable_external_access = true",
        "set allowed_paths = ['/']",
        "set allowed_directories = ['/']",
        "set lock_configuration = false",
        "reset allowed_paths",
    ],
)
def test_the_leash_cannot_be_loosened(statement: str, dataset: Workspace) -> None:
    with all_samples(dataset.load()) as samples_, pytest.raises(duckdb.Error, match="has been locked"):
        samples_.fixed(statement)


def test_two_questions_at_once_spill_apart(dataset: Workspace) -> None:
    with all_samples(dataset.load()) as one, all_samples(dataset.load()) as other:
        folders = [s.fixed("select current_setting('temp_directory')")[0][0] for s in (one, other)]
    assert folders[0] != folders[1]
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.parametrize("name", ["prompts.sql", "prompts_groups.sql"])
@pytest.mark.parametrize(("lang", "covered"), [("en", ["a"]), ("any", ["a", "b", "c"]), ("de", ["b"])])
def test_captions_in_any_language_may_be_rewritten(name: str, lang: str, covered: list[str]) -> None:
    rows = "(values ('a', 'en', 1), ('b', 'de', 2), ('c', null, 1), ('d', 'en', 0)) t(uid, lang, face_count)"
    with duckdb.connect() as connection:
        connection.execute(
            f"create table samples as select *, 's' as shard, 0 as row, '' as caption, '' as key from {rows}"
        )
        found = connection.execute((FOLDER / name).read_text("utf-8"), {"min_faces": 1, "lang": lang}).fetchall()
    assert [row[2] for row in found] == covered


# --- the same rows on every machine ---

#: What the machine decides, each in a place of its own, and what the message calls it.
MACHINE = [
    ("where random() < 0.5", "random()"),
    ("where hash(uuid()) % 2 = 0", "uuid()"),
    ("where gen_random_uuid() is not null", "gen_random_uuid()"),
    ("where uuidv7() is not null", "uuidv7()"),
    ("where now() > timestamptz '2020-01-01 00:00:00+00'", "now()"),
    ("where today() > date '2020-01-01'", "today()"),
    ("where current_date > date '2020-01-01'", "current_date"),
    ("where CURRENT_TIMESTAMP is not null", "current_timestamp"),
    ("where localtimestamp is not null", "localtimestamp"),
    ("where get_current_time() is not null", "get_current_time()"),
    ("where transaction_timestamp() is not null", "transaction_timestamp()"),
    ("where ago(interval 1 day) is not null", "ago()"),
    ("where age(timestamp '2020-01-01') is not null", "age() of one argument"),
    ("where main.random() < 0.5", "random()"),
    ('where "random"() < 0.5', "random()"),
    ("where uid in (select uid from samples where random() < 0.5)", "random()"),
    ("where list_transform([1], lambda x: random())[1] < 0.5", "random()"),
    ("where [random() for x in [1]][1] < 0.5", "random()"),
    ("where (with t as (select random() as r) select r from t) < 0.5", "random()"),
    ("order by random()", "random()"),
    ("group by all having random() < 0.5", "random()"),
    ("qualify row_number() over (order by random()) = 1", "random()"),
    ("where version() <> ''", "version()"),
    ("where current_setting('threads')::int > 0", "current_setting()"),
    ("where getvariable('x') is null", "getvariable()"),
    ("where nextval('s') > 0", "nextval()"),
    ("where txid_current() > 0", "txid_current()"),
    ("where current_schema is not null", "current_schema"),
    ("where current_database() <> ''", "current_database()"),
    ("where exists (select * from duckdb_settings())", "the table function duckdb_settings()"),
    ("where exists (select * from pragma_version())", "the table function pragma_version()"),
    ("where exists (select * from query('select 1'))", "the table function query()"),
    ("where exists (select * from information_schema.tables)", "DuckDB's own table tables"),
    ("where exists (select * from pg_catalog.pg_settings)", "DuckDB's own table pg_settings"),
    ("using sample 3", "a sample without repeatable"),
    ("tablesample bernoulli(50%)", "a sample without repeatable"),
]


@pytest.mark.parametrize(("clause", "name"), MACHINE)
def test_what_the_machine_decides_is_refused_by_name(clause: str, name: str, dataset: Workspace) -> None:
    """In work SQL and in write SQL; a question and a condition may use it, as far as DuckDB has it."""
    for file, keys in (("lang", "caption as text"), ("write", "true as dropped")):
        path = dataset.folder / f"{file}.sql"
        path.write_text(f"-- a first line\nselect shard, row, uid, {keys} from samples {clause}")
        sets = [f"{'write.select' if file == 'write' else 'stages.lang.sql'}={path}"]
        with pytest.raises(ConfigError) as caught:
            if file == "write":
                plan_write(Snapshot(dataset.load(*sets)))
            else:
                run_stage(dataset.load(*sets), "lang", Choice(), Talk(quiet=True))
        assert caught.value.what == (
            f"SQL uses {name}, which depends on the machine, not the table: another run may find other rows"
        )
        lines = ("", ":2") if name.startswith("a sample") else (":2",)
        assert caught.value.where["file"] in [f"{path}{line}" for line in lines]
        assert ("hash(uid)" in caught.value.fix) != ("$day" in caught.value.fix)


def test_every_function_that_duckdb_calls_volatile_is_refused() -> None:
    """Out of DuckDB's own list, so that a new version's new ones are refused, too."""
    with duckdb.connect() as connection:
        names = connection.execute(
            "select distinct function_name, len(parameter_types) from duckdb_functions() where stability = 'VOLATILE'"
        ).fetchall()
    assert len(names) >= 10
    for name, count in names:
        call = f"{name}({', '.join(['1'] * count)})"
        assert bool(examine(f"select {call}").refused) == (name != "error"), call


@pytest.mark.parametrize(
    "text",
    [
        "select uid from samples where hash(uid) % 100 < 10 order by uid",
        "select date_trunc('day', make_timestamptz(2020, 1, 1, 1, 1, 0)), age(t, t) from (select date '2020-01-01' t)",
        "select unnest([1, 2]), s.row from samples s, range(3) t(i)",
        "with columns as (select 1 as a), tables as (select 2 as b) select a from columns, tables",
        "select error('no') from samples where false",
        "select s.current_date from (select 1 as current_date) s",
        "select strftime(date '2020-01-01', '%Y'), timestamp '2020-01-01' at time zone 'UTC'",
        "select * from samples tablesample reservoir(3) repeatable (7)",
    ],
)  # fmt: skip
def test_what_the_table_decides_is_taken(text: str, dataset: Workspace) -> None:
    pipeline = dataset.load()
    partitions = pipeline.layout.partitions()
    with Samples(pipeline.layout, Snapshot(pipeline).known_columns, partitions, deciding=[Sql(text, "here")]) as asked:
        asked.rows(Sql(text, "here"))


def test_a_column_whose_name_is_a_word_of_sql_is_a_column() -> None:
    assert examine("select current_date from samples").refused == "current_date"
    assert examine("select current_date from samples", frozenset({"current_date"})).refused == ""


@pytest.mark.parametrize("text", ["where random() >= 0", "where now() > date '2020-01-01'", "where uuid() is not null"])
def test_a_question_and_a_condition_may_use_what_the_machine_decides(text: str, dataset: Workspace) -> None:
    assert answer(dataset.load(), Sql(f"select count(*) from samples {text}", "here"), {})[1] == [(16,)]
    choice = Choice(where=text.removeprefix("where "))
    assert make_plan(dataset.load(), choice).stages["lang"].covered == 16


@pytest.mark.parametrize(
    ("text", "is_alone"),
    [
        ("select count(*), max(uid), bool_or(row > 1) from samples group by shard", False),
        ("select * from samples where row < 3 order by uid", False),
        ("select distinct shard from samples", False),
        ("select s.shard, s.row, uid from samples s join samples t using (uid)", False),
        ("select sum(source_width::double) from samples", True),
        ("select first(uid) from samples", True),
        ("select ANY_VALUE(uid) from samples", True),
        ("select string_agg(uid, ',') from samples", True),
        ("select list(uid order by shard) from samples", True),
        ("select mode(caption) from samples", True),
        ("select uid from samples order by shard limit 3", True),
        ("select s.uid from samples s positional join samples t", True),
        ("select s.uid from samples s asof join samples t on s.shard = t.shard and s.row >= t.row", True),
        ("select uid from samples limit 10%", True),
        ("select distinct on (shard) uid from samples", True),
        ("select uid from samples qualify row_number() over (partition by shard) = 1", True),
        ("select uid from samples where row = (select arg_max(row, shard) from samples)", True),
        ("select uid from samples tablesample bernoulli(50%) repeatable (3)", True),
    ],
)
def test_what_hangs_on_the_order_of_rows_runs_on_one_thread(text: str, is_alone: bool, dataset: Workspace) -> None:
    """As many threads as there are cores bring rows in an order of their own: sums, the first of a group, ties."""
    pipeline = dataset.load()
    with Samples(pipeline.layout, Snapshot(pipeline).known_columns, [], deciding=[Sql(text, "here")]) as asked:
        [(threads,)] = asked.fixed("select current_setting('threads')")
        asked.rows(Sql(text, "here"))
    with duckdb.connect() as connection:
        [(most,)] = connection.execute("select current_setting('threads')").fetchall()
    assert threads == (1 if is_alone else most)


@pytest.mark.parametrize("place", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_every_session_has_one_time_zone_and_one_calendar(
    place: str, dataset: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", place)
    time.tzset()
    connect = duckdb.connect

    def elsewhere() -> duckdb.DuckDBPyConnection:
        connection = connect()
        connection.execute("set calendar = 'buddhist'")
        return connection

    monkeypatch.setattr(duckdb, "connect", elsewhere)
    try:
        with all_samples(dataset.load()) as asked:
            sql = Sql(
                "select current_setting('timezone'), current_setting('calendar'), "
                "timestamptz '2020-06-01 12:00:00+00'::varchar, date_part('hour', timestamptz '2020-06-01 12:00Z')",
                "here",
            )
            [row] = asked.rows(sql)
            [batch] = asked.stream(sql, rows=1)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert row == ("UTC", "gregorian", "2020-06-01 12:00:00+00", 12)
    assert tuple(batch.to_pylist()[0].values()) == row


@starts_in_ascii
def test_the_writer_s_bytes_do_not_depend_on_time_zone_and_locale(dataset: Workspace) -> None:
    (dataset.folder / "write.sql").write_text(
        "select shard, row, uid, make_timestamptz(2020, 6, 1, 12, 0, 0) as set_made, "
        "date_trunc('day', timestamptz '2020-06-01 23:30:00+00') as set_day, "
        "strftime(timestamptz '2020-06-01 23:30:00+00', '%A %H:%M') as set_text, timestamptz '2020-06-01 23:30:00+00' "
        "::date as set_date from samples where row % 2 = 0"
    )
    select = ("--set", f"write.select={dataset.folder / 'write.sql'}")
    made = []
    for zone, language in (("UTC", "C.UTF-8"), ("Asia/Kolkata", "C"), ("America/St_Johns", "POSIX")):
        done = dataset.process("write", *select, env={**os.environ, "TZ": zone, "LC_ALL": language})
        made.append([path.read_bytes() for path in sorted((dataset.root / "shards").glob("*.tar"))])
        assert ("nothing to do" in done.stderr) == (len(made) > 1), (
            done.stderr
        )  # two nodes rewrite nothing of each other
    assert made[0] == made[1] == made[2]
    assert b"2020-06-01T12:00:00" in made[0][0]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Conversion Error: no int", duckdb.Error),
        ("IO Error: no space", duckdb.IOException),
        ("Out of Memory Error: no block", duckdb.OutOfMemoryException),
    ],
)
def test_what_duckdb_says_within_an_answer_keeps_its_kind(words: str, kind: type[Exception]) -> None:
    def late() -> Iterator[pa.RecordBatch]:
        yield pa.RecordBatch.from_pydict({"row": [1]})
        raise OSError(words)

    with pytest.raises(kind, match=words) as found:
        list(batches(late()))
    assert type(found.value) is kind
    connection = duckdb.connect()
    rows = connection.sql("select if(i = 50000, error('late'), i) from range(100000) t(i)").to_arrow_reader(1000)
    with pytest.raises(duckdb.Error, match="Invalid Input Error: late"):
        list(batches(rows))


def test_a_want_of_memory_while_sql_is_parsed_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text, connection = "select random() as never_parsed_before", repeatable._connection
    with monkeypatch.context() as patch:
        patch.setattr(repeatable, "_connection", lambda: fails(duckdb.OutOfMemoryException("no block")))
        with pytest.raises(duckdb.OutOfMemoryException):
            repeatable.examine(text)
    assert repeatable._connection is connection
    assert "random" in (repeatable.examine(text).refused or "")


def fails(error: Exception) -> Any:
    raise error
