"""Names without case: json fields beside the table's columns and stages', SQL in capitals; and numbers as text."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.errors import ConfigError, SchemaError
from builder.hybrid.edit import Edit, edited_json
from builder.sources.tars.shards import TarShards, read_shard
from builder.table import schema
from builder.table.lookups import Lookup
from builder.table.query import Samples
from builder.table.schema import Column
from builder.verbs.snapshot import Snapshot
from conftest import Sample, Workspace, make_shard, picture, read_tar, samples, write_tar


def made_with(workspace: Callable[..., Workspace], fields: str, **of_json: Any) -> tuple[Workspace, tuple[str, str]]:
    """A workspace of one sample whose json has these fields, and the `--set` that carries `fields`."""
    one = samples(1)[0]
    one.fields |= of_json
    return workspace({"a": [one]}, stages="[stages.lang]\n"), ("--set", f"dataset.fields={fields}")


def test_a_field_that_differs_from_a_column_in_case_alone(workspace: Callable[..., Workspace]) -> None:
    made, option = made_with(workspace, '["Caption", "ROW", "Source_x"]', Caption="alt", ROW="3", Source_x="s")
    made.run("run", *option)
    for command in ("status", "plan"):
        made.run(command, *option)
    done = made.run("sql", "select json_Caption, json_ROW, json_Source_x from samples", "--json", *option)
    assert json.loads(done.stdout) == [{"json_Caption": "alt", "json_ROW": "3", "json_Source_x": "s"}]


@pytest.mark.parametrize(
    ("fields", "what", "column"),
    [
        ('["caption", "json_caption"]', "would both be the column 'json_caption'", "json_json_caption"),
        ('["url", "URL"]', "json fields 'url' and 'URL' would both be the column 'URL'", "json_URL"),
        ('["lang"]', "stages 'source' and 'lang' both have a column 'lang'", "json_lang"),
        ('["LANG"]', "stages 'source' and 'lang' both have a column 'lang'", "json_LANG"),
        ('[{name = "x", type = "string", column = "Row"}]', "cannot be the column 'Row'", "json_x"),
        ('["a size", "A size"]', "json fields 'a size' and 'A size' would both be the column 'A size'", "json_A_size"),
        (r'["q\"\\é", "Q\"\\é"]', "would both be the column", "json_Q___"),
    ],
)
def test_fields_of_one_name_are_refused_with_a_fix_that_works(
    workspace: Callable[..., Workspace], fields: str, what: str, column: str
) -> None:
    values = {"json_caption": "J", "URL": "U", "lang": "L", "LANG": "L", "x": "X", "A size": "S", 'Q"\\é': "Q"}
    made, option = made_with(workspace, fields, **values)
    done = made.run("run", *option, check=False)
    assert (done.returncode, made.root.exists()) == (2, False)
    assert what in done.stderr
    spec = done.stderr.partition("dataset.fields: ")[2].partition("}")[0] + "}"
    assert f'column = "{column}"' in spec
    listed = fields[1:-1].split(", ") if "{" not in fields else []
    [item] = tomllib.loads(f"fields = [{spec}]")["fields"]
    name = item["name"]
    fixed = ", ".join([*(field for field in listed if json.loads(field) != name), spec])
    made.run("run", "--set", f"dataset.fields=[{fixed}]")
    found = made.run("sql", f"select {column} from samples", "--json", "--set", f"dataset.fields=[{fixed}]")
    assert json.loads(found.stdout) == [{column: values[name]}]


def test_a_root_with_the_column_of_a_stage_that_comes_later(workspace: Callable[..., Workspace]) -> None:
    one = samples(1)[0]
    one.fields["lang"] = "L"
    made = workspace({"a": [one]}, stages="")
    made.run("ingest", "--set", 'dataset.fields=["lang"]')
    made.file.write_text(made.file.read_text() + "[stages.lang]\n")
    done = made.run("run", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: stages 'source' and 'lang' both have a column 'lang'\n"), "once"
    assert "builder drop lang" in done.stderr
    made.run("drop", "LANG")
    option = ("--set", 'dataset.fields=[{name = "lang", type = "string", column = "json_lang"}]')
    made.run("run", *option)
    done = made.run("sql", "select lang, json_lang from samples", "--json", *option)
    assert json.loads(done.stdout) == [{"lang": "en", "json_lang": "L"}]


def test_a_field_of_a_root_in_another_case(workspace: Callable[..., Workspace]) -> None:
    made, option = made_with(workspace, '["url"]', URL="U")
    made.run("ingest", *option)
    done = made.run("ingest", "--set", 'dataset.fields=["URL"]', check=False)
    assert done.returncode == 2
    assert 'column = "json_URL"' in done.stderr
    assert made.run("status", *option).returncode == 0


def test_a_field_of_a_root_whose_column_no_pipeline_can_name(workspace: Callable[..., Workspace]) -> None:
    made, option = made_with(workspace, '["a size"]', **{"a size": "S"})
    made.run("ingest", *option)
    other = ("--set", 'dataset.fields=[{name = "a size", type = "string", column = "size"}]')
    done = made.run("ingest", *other, check=False)
    assert done.returncode == 2
    assert "the root has the json's field 'a size' in the column 'a size', not in 'size'" in done.stderr
    assert "fix: builder drop 'a size' (" in done.stderr, "and nothing else: no pipeline can name that column"
    made.run("drop", "a size", *option)
    made.run("ingest", *other)
    assert made.rows("select size from samples") == [("S",)]


def test_a_root_whose_columns_differ_in_case_says_which_to_drop() -> None:
    old = (*TarShards({}).columns, Column("Caption", pa.string(), "source", "the json's field 'Caption'"))
    with pytest.raises(SchemaError, match="columns 'caption' and 'Caption', which SQL cannot tell apart") as caught:
        schema.merge(old, ())
    assert caught.value.fix.startswith("builder drop Caption")


def test_what_roots_of_older_versions_carry_stays_as_it_was_read() -> None:
    """Their columns do not tell their fields; a field whose column has another name now is read again."""
    fields = {"caption": pa.string(), "url": pa.string()}
    reading = TarShards(fields)
    bare = [Column(column.name, column.type, column.stage, column.meaning) for column in reading.columns]
    assert TarShards({}).with_columns_of(bare) == reading
    assert TarShards({}).with_columns_of(reading.columns) == reading
    assert TarShards({"Caption": pa.string()}).signature != TarShards({"json_Caption": pa.string()}).signature
    spec = Column.from_json(reading.carried[0].to_json())
    assert (spec.field, spec.name) == ("caption", "json_caption")


def test_a_struct_has_no_field_twice() -> None:
    with pytest.raises(SchemaError):
        schema.parse_type("struct<a: int64, A: int64>")


# --- SQL in capitals ---


def write_sql(made: Workspace, text: str) -> tuple[str, str]:
    (made.folder / "w.sql").write_text(text)
    return "--set", f"write.select={made.folder}/w.sql"


def test_sql_in_capitals(workspace: Callable[..., Workspace]) -> None:
    one = samples(1)[0]
    one.fields["License"] = "old"
    made = workspace({"a": [one]}, stages='[stages.lang]\nsql = "SQL"\nparams = {least = 0}\n')
    (made.folder / "l.sql").write_text("SELECT SHARD, ROW, UID, CAPTION AS TEXT FROM SAMPLES WHERE ROW >= $LEAST")
    made.file.write_text(made.file.read_text().replace('"SQL"', f'"{made.folder}/l.sql"'))
    made.run("ingest")
    assert "1 rows, 1 ok" in made.run("stage", "lang").stderr
    option = write_sql(made, "SELECT SHARD, ROW, UID, 'new' AS CAPTION, 'by' AS SET_LICENSE FROM SAMPLES")
    made.run("write", *option)
    made.run("verify", *option)
    [text] = [data for name, data in read_tar(made.root / "shards" / "a.tar").items() if name.endswith(".json")]
    fields = json.loads(text)
    assert (fields["caption"], fields["License"], "LICENSE" in fields) == ("new", "by", False)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("'a' as set_x, 'b' as set_X", "SQL returns two columns with the same name in SQL: 'set_x' and 'set_X'"),
        ("'a' as SET_CAPTION", "write SQL returned 'set_CAPTION', which the writer sets itself"),
        ("'a' as Foo", "write SQL returned a column 'Foo', which the writer does not know"),
    ],
)
def test_write_sql_of_one_name_twice_or_of_the_writer_s(dataset: Workspace, columns: str, said: str) -> None:
    done = dataset.run("write", *write_sql(dataset, f"select shard, row, uid, {columns} from samples"), check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_parameters_of_one_name(dataset: Workspace) -> None:
    done = dataset.run("sql", "select $x", "--param", "x=1", "--param", "X=2", check=False)
    assert "two parameters have the same name" in done.stderr
    assert "1" in dataset.run("sql", "select $Limit_ as n", "--param", "limit_=1").stdout


def test_columns_of_a_lookup_in_another_case(dataset: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "m.parquet"
    uid = dataset.rows("select uid from samples where shard = '00000000' and row = 0")[0][0]
    pq.write_table(pa.table({"UID": [uid], "Score": [3]}), file)
    lookup = Lookup(str(file), {"uid": (pa.string(), ("uid",)), "score": (pa.int64(), ("score",))})
    pipeline = dataset.load()
    with Samples(pipeline.layout, Snapshot(pipeline).columns, ["00000000"], {"m": lookup}) as found:
        assert found.fixed("select uid, score from m") == [(uid, 3)]


def test_a_field_set_in_another_case_is_the_sample_s_own() -> None:
    def set_to(raw: bytes) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(edited_json(raw, Edit(0, fields={"url": 1})))
        return {name: value for name, value in fields.items() if name != "provenance"}

    assert set_to(b'{"URL": 0}') == {"URL": 1}
    assert set_to(b'{"URL": 0, "url": 0}') == {"URL": 0, "url": 1}
    assert set_to(b'{"URL": 0, "Url": 0}') == {"URL": 0, "Url": 0, "url": 1}


# --- numbers as text ---


@pytest.mark.parametrize(
    "text",
    [
        "12345678901234567890123", "-9223372036854775809", "0.1000000000000000055", "1e400", "-0", "1E5", "7", "true",
        "[1e400, {\"a\": 12345678901234567890123}]",
    ],
)  # fmt: skip
def test_a_number_in_a_field_of_text_has_the_digits_of_the_json(tmp_path: Path, text: str) -> None:
    sample = Sample("k", json=f'{{"caption": "a", "n": {text}, "m": "x"}}'.encode())
    [row] = read_shard(
        make_shard(tmp_path / "s.tar", [sample]), "s", TarShards({"n": pa.string()}), "r"
    ).table.to_pylist()
    assert (row["n"], row["source_status"]) == (text, "ok")


def test_a_number_beyond_a_column_of_numbers_is_noted(tmp_path: Path) -> None:
    sample = Sample("k", json=b'{"caption": "a", "f": 1e400, "url": 1e400}')
    reading = TarShards({"f": pa.float64(), "url": pa.string()})
    [row] = read_shard(make_shard(tmp_path / "s.tar", [sample]), "s", reading, "r").table.to_pylist()
    assert (row["f"], row["url"], row["source_status"]) == (None, None, "ok")
    assert row["source_notes"] == "f: expected float64, found 1e400; url: expected text, found a number"


# --- fields that no sample has ---


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("licence", "did you mean 'license'?"),
        ("LICENSE", "did you mean 'license'?"),
        ("zzz", "fields that there are: "),
    ],
)
def test_a_field_that_no_sample_has_is_told(workspace: Callable[..., Workspace], field: str, said: str) -> None:
    made, option = made_with(workspace, f'["url", "{field}"]', license="by")
    done = made.run("ingest", *option)
    line = f"ingest: no sample that was read has the json field '{field}', which the pipeline names: {said}"
    assert line in done.stderr
    assert "'url'" not in done.stderr


def test_a_field_that_some_shard_has_is_not_told(workspace: Callable[..., Workspace]) -> None:
    one, other = samples(2)
    one.fields["license"] = "by"
    made = workspace({"a": [one], "b": [other]}, stages="")
    assert "no sample" not in made.run("ingest", "--set", 'dataset.fields=["license"]').stderr


def test_a_field_of_boxes_that_no_sample_has_is_told(workspace: Callable[..., Workspace]) -> None:
    made, option = made_with(workspace, "[]", face_boxes=[])
    done = made.run("ingest", *option, "--set", "dataset.boxes=faceboxes")
    assert "has the json field 'faceboxes', which the pipeline names: did you mean 'face_boxes'?" in done.stderr
    assert "no sample" not in made.run("ingest", "--redo").stderr


def test_shards_without_json_say_it_once(workspace: Callable[..., Workspace]) -> None:
    made = workspace({}, stages="")
    write_tar(made.folder / "source" / "0.tar", [("0.jpg", picture()), ("0.txt", b"a dog")])
    told = "no sample that was read has a json field, so these are null: url, original_width"
    assert told in made.run("ingest").stderr


def test_two_names_in_work_sql(dataset: Workspace) -> None:
    file = dataset.folder / "l.sql"
    file.write_text("select shard, row, uid, caption as text, uid as TEXT from samples")
    pipeline = dataset.load(f"stages.lang.sql={file}")
    with (
        Samples(pipeline.layout, Snapshot(pipeline).columns, ["00000000"]) as found,
        pytest.raises(ConfigError) as caught,
    ):
        found.columns(pipeline.stages["lang"].sql)
    assert "'text' and 'TEXT'" in caught.value.what
