"""What changes under a root: its sources, its pipelines, its stages, files that something damaged."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from builder import Value
from builder.cli import main
from builder.engine.counting import count_rows
from builder.engine.work import Choice
from builder.errors import ConfigError, ShardError
from builder.progress import Talk
from builder.table import column_files, partitions
from builder.verbs.ingest import run_ingest
from builder.verbs.pipeline import Pipeline
from builder.verbs.plan import make_plan
from builder.verbs.run import run_all
from builder.verbs.snapshot import Snapshot
from builder.verbs.stage import run_stage
from builder.verbs.status import read_status
from builder.verbs.verify import prove
from builder.verbs.write import plan_write, run_write
from conftest import (
    STAGES,
    Workspace,
    ingest_here,
    make_workspace,
    read_tar,
    samples,
)
from support import planned
from support.here import builder_here
from support.stages import Note, Options

Make = Callable[..., Workspace]
NOTE = """\
[stages.note]
python = "{file}:{name}"
sql = "{sql}"
"""


def with_note(workspace: Make, folder: Path, file: Path = STAGES, name: str = "Note") -> Workspace:
    sql = folder / "note.sql"
    sql.write_text("select shard, row, uid, key, caption as text from samples")
    return workspace({"a": samples(4)}, stages=NOTE.format(file=file, name=name, sql=sql))


def spoil_in_place(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def test_a_source_changed_in_place_is_read_and_written_again(workspace: Make) -> None:
    made = workspace()
    made.run("run")
    source = made.folder / "source/00000000.tar"
    spoil_in_place(source, b"street number 0", b"STREET number 0")
    talk = made.run("run").stderr
    assert "ingest: 1 shards, 8 rows" in talk
    assert "write: 1 shards, 8 rows, 5 edited" in talk
    made.run("verify")


def shards_of(made: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (made.root / "shards").glob("*.tar")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two shards and their hybrid shards; every test here leaves them as they should be."""
    made = make_workspace(tmp_path_factory.mktemp("written"))
    made.run("run")
    return made


def done(made: Workspace) -> dict[str, int]:
    """What a plan would do, stale rows included."""
    plan = make_plan(made.load(), Choice(stale=True))
    todo = {name: counts.todo for name, counts in plan.stages.items()}
    return {"ingest": len(plan.ingest.todo), **todo, "write": len(plan.write.todo)}


NOTHING = {"ingest": 0, "faces": 0, "lang": 0, "prompts": 0, "generate": 0, "write": 0}


def test_a_touched_source_loses_nothing_and_makes_nothing_stale(written: Workspace) -> None:
    question = "select * exclude (source_run, source_digests) from samples order by shard, row"
    before, shards = written.rows(question), shards_of(written)
    source = written.folder / "source/00000000.tar"
    os.utime(source)
    assert done(written) == {**NOTHING, "ingest": 1, "write": 1}
    assert prove(written.load(), Talk(quiet=True)).problems == []
    for _ in run_all(written.load(), Talk(quiet=True)):
        pass
    assert done(written) == NOTHING
    assert written.rows(question) == before
    assert shards_of(written) == shards


def test_bytes_replaced_by_as_many_are_copied_by_the_next_write_and_make_nothing_stale(written: Workspace) -> None:
    """A source is trusted not to change: of one that did, no stage computes anything anew."""
    source = written.folder / "source/00000000.tar"
    spoil_in_place(source, samples(1)[0].image or b"", bytes(len(samples(1)[0].image or b"")))
    assert done(written) == {**NOTHING, "ingest": 1, "write": 1}
    [problem] = prove(written.load(), Talk(quiet=True)).problems
    assert f"'{0:032x}-0.jpg'" in problem
    assert run_write(written.load(), Talk(quiet=True))["shards"] == 1
    assert prove(written.load(), Talk(quiet=True)).problems == []
    for _, outcome in run_all(written.load(), Talk(quiet=True)):
        assert outcome["shards"] in (0, 1)
    assert done(written) == NOTHING
    assert prove(written.load(), Talk(quiet=True)).problems == []


VERBS: dict[str, Callable[[Pipeline], object]] = {
    "plan": lambda pipeline: make_plan(pipeline, Choice()),
    "status": read_status,
    "stage": lambda pipeline: run_stage(pipeline, "lang", Choice(), Talk(quiet=True)),
    "write": lambda pipeline: plan_write(Snapshot(pipeline)),
}


def fall_behind(made: Workspace) -> None:
    """A commit whose fold a kill prevented."""
    newest = column_files.newest(made.load().layout, "00000001")["lang"]
    file = made.load().layout.column_file("00000001", "lang", newest)
    shutil.copy(file, made.load().layout.column_file("00000001", "lang", newest + 1))
    assert partitions.is_behind(made.load().layout, "00000001")


@pytest.mark.parametrize("verb", VERBS)
def test_what_decides_by_the_table_heals_it_first(written: Workspace, verb: str) -> None:
    fall_behind(written)
    VERBS[verb](written.load())
    assert not partitions.is_behind(written.load().layout, "00000001")


def test_a_question_only_says_how_many_partitions_are_behind(written: Workspace) -> None:
    fall_behind(written)
    arguments = ["sql", "select count(*) as n from samples", "--pipeline", str(written.file)]
    said = CliRunner().invoke(main, arguments)
    assert "1 partitions are behind their column files: builder status" in said.stderr
    assert partitions.is_behind(written.load().layout, "00000001")
    read_status(written.load())
    assert "behind" not in CliRunner().invoke(main, arguments).stderr


def test_workers_run_the_package_and_nothing_of_the_working_directory(workspace: Make) -> None:
    made = workspace(stages="[stages.lang]\n")
    (made.folder / "re.py").write_text("raise SystemExit('not this one')")
    (made.folder / "builder").mkdir()
    (made.folder / "builder/__init__.py").write_text("raise SystemExit('not this one')")
    script = Path(shutil.which("builder") or "")
    if not script.is_file():
        import sys

        script = Path(sys.executable).parent / "builder"
    import subprocess

    command = [str(script), "run", "--pipeline", str(made.file)]
    result = subprocess.run(command, cwd=made.folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_pipeline_with_fewer_fields_takes_none_away(workspace: Make) -> None:
    made = workspace()
    made.run("ingest")
    other = made.folder / "other.toml"
    other.write_text(f'[dataset]\nshards = "{made.folder}/source/*.tar"\nroot = "{made.root}"\n[stages.lang]\n')
    for file in (other, made.file, other):
        result = builder_here("ingest", "--pipeline", str(file))
        assert (result.returncode, result.stderr) == (0, "ingest: nothing to do (2 shards)\n")
    assert made.rows("select count(url), count(original_width) from samples") == [(16, 16)]


def test_more_fields_are_read_without_losing_the_others(workspace: Make) -> None:
    made = workspace()
    made.run("run")
    result = made.run("run", "--set", 'dataset.fields=["exif", "key"]')
    assert "ingest: 2 shards, 16 rows" in result.stderr
    assert "faces: nothing to do" in result.stderr
    fields = "count(url), count(original_width), count(exif), count(json_key), count(image_path)"
    assert made.rows(f"select {fields} from samples") == [(16, 16, 16, 16, 10)]


def test_a_field_gets_another_type_once_it_is_dropped(workspace: Make) -> None:
    made = workspace()
    made.run("ingest")
    sets = ("--set", 'dataset.fields=[{name = "original_width", type = "float64"}]')
    refused = made.run("ingest", *sets, check=False)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: column 'original_width' of stage 'source' would change its type\n"
        "  in the root: int32\n"
        "  in the stage: float64\n"
        "  fix: give the new values a new name, or drop the old column: builder drop original_width "
        f"(each builder command with {shlex.join([*sets, '--pipeline', str(made.file)])})\n"
    )
    made.run("drop", "original_width")
    made.run("ingest", *sets)
    made.run("fold", *sets)
    question = "select distinct typeof(original_width) as t, original_width as w from samples"
    [answer] = json.loads(made.run("sql", question, "--json", *sets).stdout)
    assert answer == {"t": "DOUBLE", "w": 480.0}


def test_a_stage_that_gains_an_output_is_stale(workspace: Make, tmp_path: Path) -> None:
    file = tmp_path / "stages.py"
    file.write_text(STAGES.read_text())
    made = with_note(workspace, tmp_path, file)
    made.run("ingest")
    made.run("stage", "note")
    text = file.read_text()
    text = text.replace(
        '(Value("note", pa.string(), "the word and the caption"),)',
        '(Value("note", pa.string(), "the note"), Value("size", pa.int64(), "its length"))',
        1,
    ).replace("[pa.array(notes, pa.string())]", "[pa.array(notes), pa.array([len(note) for note in notes])]")
    file.write_text(text)
    assert json.loads(made.run("plan", "--stale", "--json").stdout)["stages"]["note"]["todo"] == 4
    made.run("stage", "note", "--stale")
    assert made.rows("select count(size), count(note) from samples") == [(4, 4)]


class Signed(Note):
    """Note, and by whom: a record that decides nothing."""

    outputs = (*Note.outputs, Value("note_by", pa.string(), "who wrote it", decides=False))

    def process(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        notes = Note(self.options).process(batch)
        return pa.RecordBatch.from_arrays([notes["note"], pa.array(["me"] * len(notes))], schema=self.schema)


def test_a_stage_that_gains_a_record_of_how_it_answered_is_not_stale(dataset: Workspace) -> None:
    layout = dataset.load().layout
    before, after = Note(Options()), Signed(Options())
    planned.do(layout, planned.plan(layout, before), before)
    [counts] = count_rows(layout, [planned.work_of(layout, after, Choice(stale=True))])
    assert (counts.ok, counts.todo) == (16, 0)
    planned.do(layout, planned.plan(layout, after, Choice(redo=True, where="row = 1")), after)
    found = pq.read_table(layout.partition("00000000"), columns=["note", "note_by"]).to_pydict()
    assert found["note_by"] == [None, "me", *[None] * 6]
    assert found["note"] == [f"seen: a man with a hat is standing in the street number {i}" for i in range(8)]


@pytest.mark.parametrize("flags", [("--redo", "--stale"), ("--retry", "failed", "--redo")])
def test_choices_that_say_different_things_are_refused(dataset: Workspace, flags: tuple[str, ...]) -> None:
    result = dataset.run("stage", "lang", *flags, check=False)
    names = " and ".join(name for name in ("--retry", "--redo", "--stale") if name in flags)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: {names} cannot be used together\n"
        "  fix: use one: --retry failed rows, --redo all rows, --stale rows whose inputs or options changed\n",
    )


@pytest.mark.parametrize("file", ["shards/manifest/00000000.parquet", "samples/00000000.parquet"])
def test_a_damaged_file_that_can_be_made_again_is(workspace: Make, file: str) -> None:
    made = workspace()
    made.run("run")
    before = {path.name: path.read_bytes() for path in (made.root / "shards").glob("*.tar")}
    (made.root / file).write_bytes(b"junk")
    made.run("run")
    made.run("verify")
    assert {path.name: path.read_bytes() for path in (made.root / "shards").glob("*.tar")} == before


def test_a_damaged_column_file_is_named(workspace: Make) -> None:
    made = workspace()
    ingest_here(made.load())
    path = made.root / "columns/00000000/source.g000001.parquet"
    path.write_bytes(b"junk")
    (made.root / "samples/00000000.parquet").unlink()
    with pytest.raises(ShardError) as caught:
        read_status(made.load())
    assert str(caught.value).splitlines()[0] == "a column file is damaged"
    assert caught.value.where["file"] == path
    path.unlink()
    assert run_ingest(made.load(), Talk(quiet=True))["rows"] == 8
    assert made.rows("select count(*) from samples") == [(16,)]


def refused(made: Workspace, select: str) -> tuple[str, str]:
    """The first line and the fix of what a write SQL is refused with."""
    sql = made.folder / "w.sql"
    sql.write_text(select)
    with pytest.raises(ConfigError) as caught:
        plan_write(Snapshot(made.load(f"write.select={sql}")))
    return caught.value.what, caught.value.fix


IMAGE = (
    "image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed, image_model, "
    "image_prompt, prompt"
)


@pytest.mark.parametrize(
    ("columns", "what", "fix"),
    [
        ("'z' as set_caption", "write SQL returned 'set_caption', which the writer sets itself",
         "return the new caption as: caption"),
        ("'z' as set_provenance", "write SQL returned 'set_provenance', which the writer sets itself", "leave it out"),
        (f"{IMAGE}, 7 as set_width", "write SQL returned 'set_width', which the writer sets itself", "leave it out"),
        (f"{IMAGE}, 'z' as caption", "write SQL returned both 'image_path' and 'caption'",
         "the caption of a new image is its image_prompt: leave caption out"),
        ("interval 1 day as set_age", "write SQL returned 'set_age' of type INTERVAL, which json does not have",
         "cast it, for example: cast(set_age as varchar)"),
        ("map {'a': 1} as set_m", "write SQL returned 'set_m' of type MAP(VARCHAR, INTEGER), which json does not have",
         "cast it, for example: cast(set_m as varchar)"),
        ("'nan'::double as set_n", "write SQL returned 'set_n' = nan, which json does not have",
         "return null, a number, text or a list: cast(set_n as varchar)"),
        ("'ab'::blob as set_b", "write SQL returned 'set_b' = b'ab', which json does not have",
         "return null, a number, text or a list: cast(set_b as varchar)"),
    ],
)  # fmt: skip
def test_write_sql_that_would_break_a_sample_is_refused(dataset: Workspace, columns: str, what: str, fix: str) -> None:
    assert refused(dataset, f"select shard, row, uid, {columns} from samples") == (what, fix)


def test_values_of_sql_become_json(workspace: Make) -> None:
    made = workspace({"a": samples(2)})
    made.run("ingest")
    sql = made.folder / "w.sql"
    sql.write_text(
        "select shard, row::varchar as row, uid, 5 as caption, 0.5 as set_score,"
        " 99999999999999999999999999999999999999::hugeint as set_large,"
        " true as set_yes, date '2024-02-03' as set_day, [1, 2] as set_list, {'a': 'b'} as set_object, null as set_none"
        " from samples where row = 1"
    )
    sets = ("--set", f"write.select={sql}")
    made.run("write", *sets)
    made.run("verify", *sets)
    fields = json.loads(read_tar(made.root / "shards/a.tar")[f"{1:032x}-0.json"])
    names = ("caption", "score", "large", "yes", "day", "list", "object")
    assert [fields[name] for name in names] == ["5", 0.5, 10**38 - 1, True, "2024-02-03", [1, 2], {"a": "b"}]
    assert "none" not in fields
