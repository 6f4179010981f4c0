"""The command line as people and scripts meet it: what it prints on which stream, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from builder.cli import app, console, failures, outcomes, output
from builder.engine import runs
from builder.errors import ConfigError
from builder.hybrid import output_folder
from builder.progress import Talk
from builder.store.layout import Layout, RunFiles
from builder.table import column_files
from conftest import STAGES, Sample, Workspace, builder, make_shard, make_workspace, picture, samples, starts_in_ascii
from support.here import builder_here
from support.stages import cannot

Make = Callable[..., Workspace]
COMMANDS = {name: command for name, command in app.main.commands.items() if not command.hidden}
SQL_FILES = (
    "check", "faces", "faces_metadata", "generate", "generate_aspect", "lang", "prompts", "prompts_groups", "stats",
    "write",
)  # fmt: skip
JSON_COMMANDS = ("plan", "status", "sql", "show", "regen", "verify")


@dataclass
class Done:
    """What a command did: exit code and both streams."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one JSON value on stdout; nothing else on either stream."""
        assert self.err == ""
        assert self.out.count("\n") == 1
        return json.loads(self.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def run(*arguments: str) -> Done:
    """A command in this process."""
    result = CliRunner().invoke(app.main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def ask(dataset: Workspace) -> Callable[..., Done]:
    """A command on two ingested shards of eight samples, in this process."""
    return lambda *arguments: run(*arguments, "--pipeline", str(dataset.file))


OWN = f"""\
[stages.note]
python = "{STAGES}:%s"
sql = "{{folder}}/note.sql"
%s
"""


@pytest.fixture
def own(tmp_path: Path, workspace: Make) -> Callable[..., Workspace]:
    """A workspace with one stage of tests/support/stages.py; ingested."""

    def make(kind: str, options: str = "", **more: Any) -> Workspace:
        (tmp_path / "note.sql").write_text("select shard, row, uid, key, caption as text from samples")
        made = workspace({"a": samples(12)}, stages=OWN.format(folder=tmp_path) % (kind, options), **more)
        made.run("ingest")
        return made

    return make


# --- help ---


def test_every_command_has_help_with_an_example() -> None:
    assert list(COMMANDS) == [
        "init", "ingest", "stage", "run", "write", "plan", "status", "sql", "show", "regen", "verify", "gc", "fold",
        "drop", "demo",
    ]  # fmt: skip
    for name, command in COMMANDS.items():
        text = run(name, "--help").out
        assert text.startswith(f"Usage: builder {name} [OPTIONS]")
        assert f"\n    builder {name}" in text, name
        assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option)), name


def test_help_of_all_shows_each_command_in_one_whole_line() -> None:
    done = run("--help")
    assert done.code == 0
    lines = done.out.splitlines()
    assert not [line for line in lines[1:] if "..." in line]
    for name in COMMANDS:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert "Exit codes: 0 done; 1 it did not finish; 2 usage or a bad pipeline file; 3" in done.out


def test_version() -> None:
    from builder import __version__

    assert run("--version") == Done(0, f"builder, version {__version__}\n", "")


def test_commands_for_scripts_take_json() -> None:
    assert [name for name in COMMANDS if any(p.name == "as_json" for p in COMMANDS[name].params)] == list(JSON_COMMANDS)


# --- one JSON value ---


def test_json_of_status(ask: Callable[..., Done], dataset: Workspace) -> None:
    done = ask("status", "--json")
    untried = {"ok": 0, "failed": 0, "not_tried": 16, "out_of_date": 0, "errors": []}
    assert done.code == 0
    assert done.json() == {
        "root": str(dataset.root),
        "shards": 2,
        "healed": 0,
        "stages": {
            "source": {"ok": 16, "failed": 0, "not_tried": 0, "out_of_date": None, "errors": []},
            **dict.fromkeys(("faces", "lang", "prompts", "generate"), untried),
        },
        "rows": 16,
        "notes": {"rows": 0, "example": None},
        "no_sample": [],
        "left_out": {},
        "hybrid_shards": 0,
        "runs": 0,
    }


def test_json_of_plan(ask: Callable[..., Done]) -> None:
    done = ask("plan", "--json")
    value = done.json()
    free = value["write"].pop("bytes_free")
    needed = value["write"].pop("bytes_needed")
    assert done.code == 0
    assert free > needed > 16 * 512
    nothing = {"covered": 0, "todo": 0, "ok": 0, "failed": 0, "outside": 0, "shards": 0, "out_of_date": 0}
    assert value == {
        "ingest": {"shards": 2, "todo": 0, "missing": [], "vanished": []},
        "older": [],
        "stages": {
            "faces": {"covered": 16, "todo": 16, "ok": 0, "failed": 0, "outside": 0, "shards": 2, "out_of_date": 0},
            "lang": {"covered": 16, "todo": 16, "ok": 0, "failed": 0, "outside": 0, "shards": 2, "out_of_date": 0},
            "prompts": nothing,
            "generate": nothing,
        },
        "write": {"shards": 2, "todo": 2, "edited": 0, "dropped": 0, "stale": 0, "refused": 0, "kept": {}},
    }


def test_json_of_sql_and_show(ask: Callable[..., Done]) -> None:
    assert ask("sql", "select shard, count(*) as n from samples group by 1 order by 1", "--json").json() == [
        {"shard": "00000000", "n": 8},
        {"shard": "00000001", "n": 8},
    ]
    assert ask("sql", "select 1 as n from samples where false", "--json").json() == []
    [row] = ask("show", "00000001:2", "--json").json()
    assert (row["uid"], row["row"], row["face_count"], len(row["source_members"])) == (f"{10:032x}", 2, None, 3)


def test_json_of_values_that_json_has_no_word_for(ask: Callable[..., Done]) -> None:
    sql = (
        "select 'nan'::double as a, [1.5, 'inf'::double] as b, 'x'::blob as c, 1.50::decimal(4,2) as d, "
        "date '2026-11-21' as e, {x: '-inf'::double} as f, 2::hugeint * 10**20 as g, true as h, 'é\x1b' as i"
    )
    assert ask("sql", sql, "--json").json() == [
        {
            "a": None, "b": [1.5, None], "c": "78", "d": 1.5, "e": "2026-11-21", "f": {"x": None}, "g": 2e20, "h": True,
            "i": "é\x1b",
        }
    ]  # fmt: skip


def test_json_of_verify(dataset: Workspace) -> None:
    dataset.run("write")
    done = run("verify", "--json", "--pipeline", str(dataset.file))
    value = done.json()
    assert done.code == 0
    assert value.pop("same") == value.pop("size") > 16 * 512
    assert value == {
        "shards": 2, "rows": 16, "edited": 0, "dropped": 0, "no_end_mark": 0, "problems": [], "unread": [], "proven": 2,
    }  # fmt: skip
    hybrid = dataset.root / "shards/00000000.tar"
    data = bytearray(hybrid.read_bytes())
    data[600] ^= 1
    hybrid.write_bytes(data)
    done = run("verify", "--json", "--pipeline", str(dataset.file))
    assert done.code == 3
    assert len(done.json()["problems"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (
            ("sql", "selec 1"), 2,
            {
                "class": "ConfigError",
                "what": 'DuckDB refuses the SQL: Parser Error: syntax error at or near "selec"\n'
                "  LINE 1: selec 1\n          ^^^^^",
                "where": {"file": "the command line"},
                "fix": "edit that SQL",
            },
        ),
        (
            ("sql",), 2,
            {
                "class": "ConfigError", "what": "builder sql needs QUESTION",
                "where": {"usage": "builder sql [OPTIONS] QUESTION"},
                "fix": 'builder sql "select lang, count(*) from samples where face_count > 0 group by 1"',
            },
        ),
        (
            ("status", "--sett", "x"), 2,
            {
                "class": "ConfigError", "what": "builder status has no option --sett",
                "where": {"its options": "--scale, --pipeline, --set, --json"}, "fix": "did you mean --set?",
            },
        ),
        (
            ("status", "--scale", "medium", "--pipeline", "x.toml"), 2,
            {
                "class": "ConfigError", "what": "--scale and --pipeline both name a pipeline", "where": {},
                "fix": "give one of them",
            },
        ),
        (
            ("plan", "--pipeline", "none.toml"), 2,
            {
                "class": "ConfigError", "what": "no pipeline file 'none.toml'", "where": {},
                "fix": "name one that exists, or start with: builder init DIR",
            },
        ),
        (
            ("verify", "--set", "dataset.shards=none/*.tar", "--set", "dataset.root=none"), 2,
            {
                "class": "ConfigError", "what": "no shard matches dataset.shards",
                "where": {
                    "pattern": "none/*.tar", "folder": "none (does not exist)", "working directory": str(Path.cwd()),
                },
                "fix": 'set dataset.shards to your tars, for example: --set dataset.shards="data/*.tar"',
            },
        ),
        (
            ("show", "nobody", "--set", "dataset.root=none"), 2,
            {
                "class": "ConfigError", "what": "no sample has the uid 'nobody'", "where": {"root": "none"},
                "fix": "give a uid of the table (builder sql 'select uid from samples limit 5'), or SHARD:ROW (each "
                "builder command with --set dataset.root=none)",
            },
        ),
    ],
)  # fmt: skip
def test_json_of_errors(arguments: tuple[str, ...], code: int, error: dict[str, Any]) -> None:
    done = run(*arguments, "--json")
    told = done.json()["error"]
    assert (done.code, told["class"], told["where"], told["fix"]) == (
        code,
        error["class"],
        error["where"],
        error["fix"],
    )
    if "--sett" not in arguments:  # how click words this differs between its versions
        assert told["what"] == error["what"]


def test_json_of_a_file_that_cannot_be_read(ask: Callable[..., Done], dataset: Workspace) -> None:
    place = dataset.root / "samples/00000000.parquet"
    place.unlink()
    place.mkdir()
    done = ask("status", "--json")
    assert done.code == 1
    assert done.json()["error"]["class"] in ("StageError", "MachineError")


def test_json_from_a_process_is_all_there_is(dataset: Workspace) -> None:
    """As a script runs it: no warning of a library slips onto either stream."""
    for arguments in (("plan",), ("sql", "select 1"), ("verify",)):
        done = dataset.process(*arguments, "--json", check=False)
        Done(done.returncode, done.stdout, done.stderr).json()


# --- exit codes ---


def test_exit_0_done(ask: Callable[..., Done]) -> None:
    assert ask("status").code == 0


def test_exit_1_did_not_finish(own: Callable[..., Workspace]) -> None:
    done = own("NoModel").process("stage", "note", check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "error: there is no model in '/models/none'" in lines
    assert lines[-1] == "  fix: name a folder that has one"


def test_exit_2_usage_and_bad_pipelines(tmp_path: Path) -> None:
    done = run("nothing")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: there is no command 'nothing'\n"
        f"  commands: {', '.join(COMMANDS)}\n"
        "  fix: builder help describes each of them\n"
    )
    assert run().code == 2
    bad = tmp_path / "bad.toml"
    bad.write_text("[dataset]\nroot = 'out'\nshards = '*.tar'\n[runs]\n")
    assert run("status", "--pipeline", str(bad)) == Done(
        2, "", f"error: unknown section [runs]\n  file: {bad}:4\n  fix: did you mean 'run'?\n"
    )


def test_exit_3_failed_rows_and_what_to_do(own: Callable[..., Workspace]) -> None:
    made = own("Fails", f'bad = ["{3:032x}-0"]')
    done = made.process("stage", "note", check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-3:] == [
        "note: 1 failed",
        f"  why: builder status --pipeline {made.file}",
        f"  to try them again: builder stage note --retry failed --pipeline {made.file}",
    ]
    status = run("status", "--pipeline", str(made.file)).out
    example = cannot(f"{3:032x}-0")
    assert status.splitlines()[-3:] == [
        "stage  failed with  rows  for example",
        f"-----  -----------  ----  {'-' * len(example)}",
        f"note   ValueError      1  {example}",
    ]


def test_exit_3_refused_shard(workspace: Make) -> None:
    made = workspace({"a": samples(2)})
    (made.folder / "source/b.tar").write_bytes(b"")
    done = made.run("ingest", check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-3:] == [
        "refused shard 'b': the shard is empty (0 bytes)",
        f"  file: {made.folder}/source/b.tar",
        "  fix: download or make it again",
    ]


def test_exit_130_stopped_as_a_scheduler_does_and_gone_on(own: Callable[..., Workspace]) -> None:
    made = own("Note", "pause_s = 0.5", checkpoint_rows=4)
    command = [sys.executable, "-m", "builder", "stage", "note", "--pipeline", str(made.file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(made.root.glob("columns/a/note.g*.parquet")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert talk.splitlines()[-1] == "stopped: everything committed is kept; run the same command again to continue"
    [(before,)] = made.rows("select count(note) from samples")
    assert 4 <= before < 12
    made.run("stage", "note")
    assert made.rows("select count(note) from samples") == [(12,)]


def test_nothing_to_verify_is_no_proof(workspace: Make) -> None:
    made = workspace({"a": samples(1)})
    done = run("verify", "--pipeline", str(made.file))
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[1:] == [
        "error: there is nothing to verify: the table has none of the pipeline's shards",
        f"  root: {made.root}",
        f"  fix: builder run --pipeline {made.file}",
    ]


def test_root_that_is_a_file(ask: Callable[..., Done], dataset: Workspace) -> None:
    for command in (("status",), ("plan",), ("sql", "select 1")):
        assert ask(*command, "--set", f"dataset.root={dataset.file}") == Done(
            2,
            "",
            f"error: dataset.root '{dataset.file}' is a file\n  pipeline: {dataset.file}\n"
            "  fix: name a folder; it may exist already\n",
        )


# --- what people read ---


def test_plan_in_words(ask: Callable[..., Done], dataset: Workspace) -> None:
    done = ask("plan")
    lines = done.out.splitlines()
    assert lines[:-2] == [
        "ingest",
        "  shards that the pipeline names  2",
        "  new or changed, to read         0",
        "",
        "stage     covered  ok  failed  out of date  to do  in shards  ok, not covered now",
        "--------  -------  --  ------  -----------  -----  ---------  -------------------",
        "faces          16   0       0            0     16          2                    0",
        "lang           16   0       0            0     16          2                    0",
        "prompts         0   0       0            0      0          0                    0",
        "generate        0   0       0            0      0          0                    0",
        "",
        "write",
        "  hybrid shards             2",
        "  not up to date, to write  2",
        "  samples edited            0",
        "  samples dropped           0",
    ]
    assert [line.split("  ")[1] for line in lines[-2:]] == ["bytes needed", "bytes free"]
    assert done.err == f"next: builder run --pipeline {dataset.file}\n"
    done = ask("plan", "--redo", "--where", "row < 3", "--set", "dataset.name=a b")
    assert done.err == (
        f"next: builder stage faces --redo --where 'row < 3' --pipeline {dataset.file} --set 'dataset.name=a b'\n"
    )


def test_plan_names_what_is_missing_and_what_is_gone(ask: Callable[..., Done], dataset: Workspace) -> None:
    shards = f'dataset.shards=["{dataset.folder}/source/00000000.tar", "none.tar"]'
    assert ask("plan", "--set", shards).out.splitlines()[:5] == [
        "ingest",
        "  shards that the pipeline names  1",
        "  new or changed, to read         0",
        "  named and not there             1",
        "  in the table, no longer named   1",
    ]


def test_status_of_an_empty_root(workspace: Make) -> None:
    made = workspace()
    done = run("status", "--pipeline", str(made.file))
    assert done.out.splitlines()[0] == f"{made.root}: 0 rows of 0 shards, 0 hybrid shards, 0 runs"
    assert done.err == f"the table is empty; next: builder ingest --pipeline {made.file}\n"
    assert not made.root.exists()


def test_show_in_words(ask: Callable[..., Done]) -> None:
    done = ask("show", "00000000:1")
    lines = done.out.splitlines()
    assert lines[:6] == [
        f"sample {1:032x}: shard 00000000 row 1",
        "",
        "source: ok",
        f"  uid                  {1:032x}",
        "  shard                00000000",
        "  row                  1",
    ]
    assert lines[-8:] == [
        "",
        "faces: not tried",
        "",
        "lang: not tried",
        "",
        "prompts: not tried",
        "",
        "generate: not tried",
    ]
    assert ask("show", f"{1:032x}") == done


def test_show_saves_the_image(ask: Callable[..., Done], tmp_path: Path) -> None:
    done = ask("show", "00000000:1", "--save", str(tmp_path / "saved"))
    path = tmp_path / "saved/00000000-000001-source.jpg"
    assert done.err == f"written {path}\n"
    assert path.read_bytes() == picture(1)


def test_sql_as_a_table(ask: Callable[..., Done]) -> None:
    done = ask("sql", "select shard, count(*) as n, 0.5 as half, null as x from samples group by 1 order by 1")
    assert done == Done(
        0,
        "shard     n  half  x\n--------  -  ----  ----\n00000000  8   0.5  null\n00000001  8   0.5  null\n",
        "",
    )
    assert ask("sql", "select uid from samples where false") == Done(0, "uid\n---\n", "no rows\n")


def test_sql_as_csv(ask: Callable[..., Done]) -> None:
    sql = (
        "select row, null as x, 'a, \"b\"\nc' as text, [1, 2] as list, row > 0 as flag from samples"
        " where shard = $shard and row < 2"
        " order by 1"
    )
    assert ask("sql", sql, "--csv", "--param", 'shard="00000001"') == Done(
        0, 'row,x,text,list,flag\n0,,"a, ""b""\nc","[1, 2]",false\n1,,"a, ""b""\nc","[1, 2]",true\n', ""
    )


def test_sql_with_bad_parameters(ask: Callable[..., Done]) -> None:
    assert ask("sql", "select 1", "--param", "x") == Done(
        2, "", "error: --param takes NAME=VALUE, not 'x'\n  fix: for example: --param lang=en\n"
    )
    assert ask("sql", "select $n + 1 as n", "--param", "n=1").out == "n\n-\n2\n"


def test_sql_from_a_file(ask: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "q.sql").write_text("select count(*) as n\nfrom samples; -- all of them\n")
    assert ask("sql", str(tmp_path / "q.sql")).out == " n\n--\n16\n"


def test_stage_without_a_name_lists_the_stages(ask: Callable[..., Done], dataset: Workspace) -> None:
    assert ask("stage") == Done(
        2,
        "",
        f"error: builder stage needs the name of a stage\n  file: {dataset.file}\n"
        f"  stages: faces, lang, prompts, generate\n  fix: builder stage faces --pipeline {dataset.file}\n",
    )


def test_stage_that_the_pipeline_lacks(ask: Callable[..., Done], dataset: Workspace) -> None:
    assert ask("stage", "face") == Done(
        2,
        "",
        f"error: the pipeline has no stage 'face'\n  file: {dataset.file}\n  stages: faces, lang, prompts, generate\n"
        "  fix: name one of these, or add [stages.face]\n",
    )


def test_init_copies_and_keeps(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    done = run("init", str(target))
    names = [f"sql/{name}.sql" for name in SQL_FILES]
    names += ["pipelines/large.toml", "pipelines/small.toml"]
    following = f"next: cd {target}, set dataset.shards and dataset.root in pipelines/small.toml, builder plan\n"
    assert done == Done(0, "", "".join(f"written  {target / name}\n" for name in names) + following)
    (target / "sql/lang.sql").write_text("select 1")
    assert run("init", str(target)).err == "".join(f"kept     {target / name}\n" for name in names) + following
    assert (target / "sql/lang.sql").read_text() == "select 1"


def test_init_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = run("init", str(tmp_path / "mine"))
    assert done.code == 2
    assert done.err.splitlines()[0] == f"error: invalid value for 'FOLDER': Directory '{tmp_path}/mine' is a file"


def test_fold_and_drop(ask: Callable[..., Done], dataset: Workspace) -> None:
    dataset.run("stage", "lang")
    assert ask("fold").err.splitlines()[-1] == "0 partitions folded"
    done = ask("drop", "lang_score")
    again = f"--pipeline {dataset.file}"
    assert done == Done(
        0,
        "",
        f"column 'lang_score' is dropped; builder fold {again} takes it out of the partitions\n"
        "stage 'lang' of this pipeline has it: its next run brings it back\n",
    )
    assert ask("fold").err.splitlines()[-1] == "2 partitions folded"
    assert ask("drop", "caption").err == (
        "error: column 'caption' cannot be dropped\n  stage: source\n  fix: drop an output of a stage or a json field\n"
    )
    assert ask("drop", "nothing").err == (
        f"error: the table has no column 'nothing'\n  root: {dataset.root}\n  fix: builder sql 'describe samples' "
        f"(each builder command with {again})\n"
    )


def test_gc_says_what_it_deletes(ask: Callable[..., Done], dataset: Workspace) -> None:
    left = dataset.root / "columns/00000000/.lang.g000001.parquet.1-00000000.tmp"
    left.write_bytes(b"12345")
    os.utime(left, (0, 0))
    done = ask("gc", "--dry-run")
    assert (done.code, done.err.splitlines()[-1][:12]) == (0, "would delete")
    assert left.exists()


# --- terminals ---


def test_escapes_in_captions_are_never_printed_raw(workspace: Make) -> None:
    nasty = "red \x1b[31m\x1b]0;title\x07 \u202egnp.exe \x9b2J\r\nnew line"
    made = workspace({"a": [Sample("0", nasty, fields={"url": nasty})]}, stages="")
    made.run("ingest")
    question = ("sql", 'select caption, [caption] as list, {c: caption} as struct, caption as "\x1b[1m" from samples')
    for arguments in (question, ("show", "a:0")):
        done = run(*arguments, "--pipeline", str(made.file))
        assert done.code == 0
        shown = done.out + done.err
        assert not [char for char in shown if not char.isprintable() and char != "\n"]
        assert "red \\x1b[31m\\x1b]0;title\\x07 \\u202egnp.exe \\x9b2J\\r\\nnew line" in shown
    [row] = run(*question, "--json", "--pipeline", str(made.file)).json()
    assert row["caption"] == nasty
    failing = run("sql", "select cast(caption as int) from samples", "--pipeline", str(made.file))
    assert failing.code == 2
    assert not [char for char in failing.err if not char.isprintable() and char != "\n"]


def test_a_printed_table_lines_up_and_has_no_blanks_at_line_ends(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(
        ("name", "n", "share", "flag"),
        [("日本", 5, 0.5, True), ("x" * 200, 12345, None, None), ("", -1, 100.0, False), ("y", 2, 1 / 3, None)],
    )
    cut = "x" * 97 + "..."
    assert capsys.readouterr().out.splitlines() == [
        f"{'name':<100}      n     share  flag",
        f"{'-' * 100}  -----  --------  -----",
        f"{'日本':<98}      5       0.5  true",
        f"{cut}  12345      null  null",
        f"{'':<100}     -1       100  false",
        f"{'y':<100}      2  0.333333  null",
    ]


# --- beside a running stage ---


def test_sql_answers_while_a_stage_runs(own: Callable[..., Workspace]) -> None:
    made = own("Note", "pause_s = 1.0", checkpoint_rows=4)
    command = [sys.executable, "-m", "builder", "stage", "note", "--pipeline", str(made.file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(made.root.glob("columns/a/note.g*.parquet")):
            time.sleep(0.05)
        [row] = run("sql", "select count(*) as n from samples", "--json", "--pipeline", str(made.file)).json()
        assert row == {"n": 12}
        assert process.poll() is None, "the stage was over before the question: the test shows nothing"
    finally:
        process.terminate()
        process.wait(timeout=60)


def in_time(
    limit_s: float, command: Callable[[], subprocess.CompletedProcess[str]]
) -> subprocess.CompletedProcess[str]:
    """What a command did, if it took less than the limit of the processor: the clock hangs on what else runs."""
    used = _processor_s()
    done = command()
    assert _processor_s() - used < limit_s
    return done


def _processor_s() -> float:
    """Seconds of the processor that processes started here have taken."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_nothing_to_do_is_said_in_under_two_seconds(workspace: Make) -> None:
    made = workspace({"a": samples(2)}, stages="")
    made.process("run")
    done = in_time(2, lambda: made.process("run"))
    assert done.stderr.splitlines() == [
        "ingest: nothing to do (1 shards)",
        "write: nothing to do (1 hybrid shards up to date)",
    ]


def test_no_shard_matches_is_said_in_under_a_second(workspace: Make) -> None:
    made = workspace({"a": samples(1)})
    make_shard(made.folder / "b.tar", samples(1))
    arguments = ("--pipeline", str(made.file), "--set", f"dataset.shards={made.folder}/{{00..02}}.tar")
    done = in_time(1, lambda: builder("plan", *arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: no shard matches dataset.shards\n  pattern: {made.folder}/{{00..02}}.tar\n"
        f"  folder: {made.folder} (exists)\n  working directory: {Path.cwd()}\n"
        "  fix: that folder has 1 tars, b.tar to b.tar: set dataset.shards to fit them\n"
    )


# --- words that are misspelt ---


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (("runn",), "there is no command 'runn'", "did you mean: builder run"),
        (("verison",), "there is no command 'verison'", "did you mean: builder version"),
        (("query", "select 1"), "there is no command 'query'", "did you mean: builder sql"),
        (("stats",), "there is no command 'stats'", "did you mean: builder status"),
        (("help", "nop"), "there is no command 'nop'", "builder help describes each of them"),
        (("run", "--stale"), "builder run has no option --stale",
         "stage by stage: builder stage NAME --stale, then builder run; builder plan --stale counts"),
        (("run", "--dry-run"), "builder run has no option --dry-run",
         "builder plan shows what a run would do, and starts nothing"),
        (("run", "--dry-run", "--pipeline", "a b"), "builder run has no option --dry-run",
         "builder plan shows what a run would do, and starts nothing (each builder command with --pipeline 'a b')"),
        (("stage", "lang", "--wher", "x"), "builder stage has no option --wher", "did you mean --where?"),
        (("status", "--zzz"), "builder status has no option --zzz", "builder status --help"),
        (("run", "small"), "builder run has too many words: 'small'", "name the pipeline with --scale small"),
        (("run", "my.toml"), "builder run has too many words: 'my.toml'", "name the pipeline with --pipeline my.toml"),
        (("run", "lang"), "builder run has too many words: 'lang'", "one stage alone: builder stage lang"),
        (("ingest", "a.tar", "b.tar"), "builder ingest has too many words: 'a.tar b.tar'",
         "name shards in the pipeline, or in quotes: --set 'dataset.shards=DIR/*.tar'"),
        (("sql", "select", "1"), "builder sql has too many words: '1'",
         'put the SQL in quotes: builder sql "select count(*) from samples"'),
        (("show",), "builder show needs UID", "builder show 00000000:3 --save /tmp/sample"),
        (("drop",), "builder drop needs COLUMN", "builder drop lang_score --scale small"),
        (("stage", "lang", "--try", "x"), "invalid value for '--try': 'x' is not a valid integer range",
         "builder stage --help"),
        (("demo", "--workers", "0"), "invalid value for '--workers': 0 is not in the range x>=1",
         "builder demo --help"),
        (("stage", "lang", "--try"), "option '--try' requires an argument", "builder help"),
        (("--nope",), "builder has no option --nope", "builder --help"),
    ],
)  # fmt: skip
def test_every_misuse_says_what_where_and_how_to_mend_it(arguments: tuple[str, ...], what: str, fix: str) -> None:
    done = run(*arguments)
    lines = done.err.splitlines()
    assert (done.code, done.out, lines[0], lines[-1]) == (2, "", f"error: {what}", f"  fix: {fix}")
    if arguments[0] in JSON_COMMANDS:
        assert run(*arguments, "--json").json()["error"]["fix"] == fix


def test_every_option_of_another_command_names_one_that_there_is() -> None:
    """The words that a misuse points on to are commands and options of this version."""
    for (command, option), advice in console.ELSEWHERE.items():
        assert option not in [name for p in COMMANDS[command].params for name in p.opts]
        for named in re.findall(r"builder ([a-z]+)", advice):
            assert named in COMMANDS, advice
    for name, meant in console.ALIASES.items():
        assert name not in COMMANDS
        assert meant.split()[0] in COMMANDS


def test_help_and_version_are_commands_too() -> None:
    assert run("help") == run("--help")
    for name in COMMANDS:
        assert run("help", name) == run(name, "--help")
    assert run("version") == run("--version")


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("fail", "for all failed rows: --retry failed"),
        ("failed:", "for all failed rows: --retry failed"),
        ("failed:{}", "for all failed rows: --retry failed"),
        ("", "for all failed rows: --retry failed"),
        ("timeout", "for one class of error: --retry failed:timeout"),
        ("fails:timeout", "for one class of error: --retry failed:timeout"),
        ("failed:a b", "for all failed rows: --retry failed"),
        ("Failed", "for all failed rows: --retry failed"),
    ],
)
def test_what_retry_takes(word: str, fix: str, ask: Callable[..., Done], dataset: Workspace) -> None:
    for arguments in (("stage", "lang"), ("plan",)):
        done = ask(*arguments, "--retry", word)
        lines = done.err.splitlines()
        assert done.code == 2
        assert lines[0] == f"error: --retry takes 'failed' or 'failed:CLASS', not '{word}'"
        assert lines[-1].startswith(f"  fix: {fix}")


def test_advice_names_the_pipeline_that_was_given() -> None:
    """Once, where a command is named that works on one; the words of a sentence are none."""

    def told(fix: str, *arguments: str) -> str:
        error = ConfigError("x", fix=fix)
        failures.name_pipeline(error, arguments)
        return error.fix

    given = ("stage", "lang", "--set", "a=b c", "--pipeline", "my p.toml")
    assert told("builder ingest, then this", *given) == (
        "builder ingest, then this (each builder command with --set 'a=b c' --pipeline 'my p.toml')"
    )
    assert told("builder ingest", "run") == "builder ingest"
    for fix in ("builder downloads no models", "builder init DIR", "builder run --pipeline 'my p.toml' --set 'a=b c'"):
        assert told(fix, *given) == fix
    assert told("builder stage --help", *given) == "builder stage --help"
    assert told("builder gc", "gc", "--scale=large").endswith("with --scale=large)")


def test_options_before_the_command() -> None:
    for words in (("--pipeline", "x.toml", "run"), ("--json", "status")):
        with pytest.raises(ConfigError, match=f"builder has no option {words[0]}") as caught:
            raise console.misused(click_error(*words))
        assert caught.value.fix == f"put options after the command: builder COMMAND {words[0]} ..."
    assert console.misused(click_error("--nothing")).fix == "builder --help"


def click_error(*words: str) -> click.UsageError:
    with pytest.raises(click.UsageError) as caught:
        app.main.make_context("builder", list(words))
    return caught.value


def test_each_command_that_takes_a_pipeline_is_known_to_the_advice() -> None:
    taking = [name for name, command in COMMANDS.items() if any(p.name == "pipeline" for p in command.params)]
    assert [name for name in COMMANDS if failures.names_a_command(f"builder {name}")] == taking


# --- which sample ---


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("00000000:9999", ["error: shard '00000000' has no row 9999", "  its rows: 0 to 7",
                           "  fix: give one of these: builder show 00000000:7"]),
        ("00000000:99999999999999999999999", ["error: shard '00000000' has no row 99999999999999999999999",
                           "  its rows: 0 to 7", "  fix: give one of these: builder show 00000000:7"]),
        ("0000000O:1", ["error: the table has no shard '0000000O', and no sample has the uid '0000000O:1'",
                        "  shards: 00000000, 00000001", "  fix: did you mean '0000000"]),
        ("nothing:1", ["error: the table has no shard 'nothing', and no sample has the uid 'nothing:1'",
                       "  shards: 00000000, 00000001", "  fix: give a shard of the table, or a uid"]),
        ("00000000:²", ["error: no sample has the uid '00000000:²'", "  fix: give a uid of the table"]),
        ("00000000:٣", ["error: no sample has the uid '00000000:٣'", "  fix: give a uid of the table"]),
        ("00000000:-1", ["error: no sample has the uid '00000000:-1'", "  fix: give a uid of the table"]),
    ],
)  # fmt: skip
def test_a_sample_that_there_is_not(name: str, told: list[str], ask: Callable[..., Done], dataset: Workspace) -> None:
    done = ask("show", name)
    lines = [line for line in done.err.splitlines() if not line.startswith("  root: ")]
    assert done.code == 2
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True)), lines
    if "builder" in lines[-1]:
        assert f"--pipeline {dataset.file}" in lines[-1]


def test_a_uid_with_a_colon_is_found(workspace: Make) -> None:
    made = workspace({"a": [Sample("0-0", fields={"uid": "here:7"})]})
    made.run("ingest")
    assert made.run("show", "here:7").stdout.startswith("sample here:7: shard a row 0")


# --- streams and encodings ---


def _shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell in which $BUILDER is the command."""
    command = f"{shlex.quote(sys.executable)} -m builder"
    return subprocess.run(
        ["bash", "-c", line.replace("$BUILDER", command)], capture_output=True, text=True, timeout=200,
        stdin=subprocess.DEVNULL, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


QUESTION = "sql 'select * from samples, range(400)' --csv"


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [
        (QUESTION, ">&-"),
        (QUESTION, "2>&-"),
        (QUESTION, "<&- >&- 2>&-"),
        (QUESTION, "| head -1 >/dev/null"),
        ("status", ">&- 2>&-"),
        ("ingest --redo", "2>&-"),
        ("ingest --redo", "<&- >&- 2>&-"),
        ("ingest --redo", "2>&1 | head -c 1 >/dev/null"),
    ],
)
def test_a_closed_stream_is_no_error(arguments: str, ends: str, dataset: Workspace) -> None:
    """A question, and work that talks: done whole, exit 0, no traceback, and nothing written into its files."""
    done = _shell(f"set -o pipefail; $BUILDER {arguments} --pipeline {shlex.quote(str(dataset.file))} {ends}")
    assert (done.returncode, "Traceback" in done.stderr, "Error" in done.stderr) == (0, False, False), done.stderr
    assert dataset.rows("select count(*) from samples") == [(16,)]
    generations = column_files.listing(dataset.load().layout, "00000000")["source"]
    assert len(generations) == (2 if arguments == "ingest --redo" else 1)


def test_a_full_disk_behind_stdout_is_an_error(dataset: Workspace) -> None:
    done = _shell(f"$BUILDER sql 'select * from samples' --csv --pipeline {shlex.quote(str(dataset.file))} > /dev/full")
    assert done.returncode == 1
    assert "the disk is full" in done.stderr


def test_a_full_disk_behind_stderr_is_no_error(dataset: Workspace) -> None:
    pipeline = shlex.quote(str(dataset.file))
    assert _shell(f"$BUILDER ingest --redo --pipeline {pipeline} 2> /dev/full").returncode == 0
    assert _shell(f"$BUILDER show nothing --pipeline {pipeline} 2> /dev/full").returncode == 2


@starts_in_ascii
@pytest.mark.parametrize(
    ("environment", "commands"),
    [
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            ("run", "status", "sql 'select shard from samples' --csv", "verify", "show 'ä:1'"),
        ),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0"}, ("run", "sql 'select shard from samples' --csv")),
    ],
)
def test_a_folder_with_letters_beyond_ascii_under_an_ascii_locale(
    environment: dict[str, str], commands: tuple[str, ...], tmp_path: Path
) -> None:
    stages = "" if environment["LC_ALL"] == "POSIX" else "[stages.lang]\n"
    made = make_workspace(tmp_path / "Füße 図", {"ä": samples(2)}, stages=stages)
    for arguments in commands:
        done = _shell(f"$BUILDER {arguments} --pipeline {shlex.quote(str(made.file))}", **environment)
        assert done.returncode == 0, done.stderr
        if "sql" in arguments:
            assert done.stdout.splitlines() == ["shard", "\\xe4", "\\xe4"]  # as far as the terminal can show it
    assert (made.root / "shards/ä.tar").exists()


# --- what a run finds first ---


def _broken(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["stages.prompts.sql={none}"], "no SQL file '{none}'"),
        (["stages.lang.sql={unbound}"], "DuckDB refuses the SQL: Binder Error"),
        (["stages.lang.sql={misspelt}"], "DuckDB refuses the SQL: Parser Error"),
        (["stages.lang.sql={columns}"], "work SQL returned a column 'caption', which stage 'lang' does not take"),
        (["stages.lang.sql={machine}"], "SQL uses random(), which depends on the machine"),
        (["stages.lang.sql={parameter}"], "SQL uses $threshold, which has no value"),
        (["stages.prompts.params.more=1"], "parameter 'more' is given, but the SQL does not use $more"),
        (["write.select={none}"], "no SQL file '{none}'"),
        (["write.select={unbound}"], "DuckDB refuses the SQL: Binder Error"),
        (["write.select={machine}"], "SQL uses random(), which depends on the machine"),
        (["write.select={columns}"], "write SQL returned a column 'text', which the writer does not know"),
        (["write.params.more=1"], "parameter 'more' is given, but the SQL does not use $more"),
        (["stages.faces.source=auto", "stages.faces.metadata=none/*.parquet"], "no file matches 'none/*.parquet'"),
        (["stages.faces.detector=scrfd", "stages.faces.model=none.onnx", "stages.faces.source=detector"],
         "none.onnx"),
        (["stages.generate.backend=diffusers", "stages.generate.model=none/model/of/mine"],
         "none/model/of/mine"),
    ],
)  # fmt: skip
def test_a_run_finds_first_what_plan_can_find(sets: list[str], told: str, workspace: Make) -> None:
    """Nothing is ingested, no stage starts: SQL, parameters, files and models are looked at before."""
    made = workspace({"a": samples(4)})
    files_ = {
        "none": "none.sql",
        "unbound": _broken(made.folder, "unbound.sql", "select shard, row, uid, captions as text from samples"),
        "misspelt": _broken(made.folder, "misspelt.sql", "selec shard, row, uid, caption as text from samples"),
        "columns": _broken(made.folder, "columns.sql", "select shard, row, uid, caption as text, caption from samples"),
        "machine": _broken(made.folder, "machine.sql", "select shard, row, uid from samples where random() < 0.1"),
        "parameter": _broken(
            made.folder, "parameter.sql", "select shard, row, uid, caption as text from samples where row > $threshold"
        ),
    }
    options = [word for item in sets for word in ("--set", item.format(**files_))]
    done = made.run("run", *options, check=False)
    assert (done.returncode != 0, "Traceback" in done.stderr) == (True, False), done.stderr
    assert told.format(**files_) in done.stderr
    assert not made.root.exists()


def test_a_run_tells_every_problem_at_once(workspace: Make) -> None:
    made = workspace({"a": samples(4)})
    one = _broken(made.folder, "one.sql", "select shard, row, uid, nothing as text from samples")
    other = _broken(made.folder, "other.sql", "select shard, row, uid, now() as set_at from samples")
    done = made.run(
        "run", "--set", f"stages.lang.sql={one}", "--set", f"write.select={other}",
        "--set", "stages.prompts.params.x=1", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: 3 problems in the pipeline\n")
    assert all(f"file: {path}" in done.stderr for path in (one, other))
    assert "parameter 'x' is given" in done.stderr
    assert not made.root.exists()


@pytest.mark.parametrize("name", ["/", ".", "..", "empty", "out/runs", "out/runs/..", "/tmp", "elsewhere/a-run"])
def test_a_task_of_a_folder_that_is_no_run_directory(workspace: Make, name: str) -> None:
    made = workspace({"a": samples(1)})
    made.run("ingest")
    for folder in ("empty", "elsewhere/a-run", "runs/a-run"):
        (made.folder / folder).mkdir(parents=True)
    (made.folder / "runs/a-run/run.json").write_text("{}")  # of the same name, and not the folder that was named
    done = builder_here("task", name, "0", cwd=made.folder)
    folder = (made.folder / name).absolute()
    assert (done.returncode, done.stderr) == (
        2,
        f"error: '{folder}' is not a run directory\n  looked for: {folder / 'run.json'}\n"
        "  fix: name a directory in runs/ of a root\n",
    )


def test_a_run_finds_a_full_disk_first(workspace: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = workspace({"a": samples(4), "b": samples(4, start=4)})
    sizes = [path.stat().st_size for path in sorted((made.folder / "source").iterdir())]
    monkeypatch.setattr(output_folder, "free_bytes", lambda layout: sum(sizes) - 1)
    done = made.run("run", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: too little free disk: 2 hybrid shards take about {sum(sizes):,} bytes, {sum(sizes) - 1:,} are free\n"
    )
    assert "[write] folder" in done.stderr
    assert not made.root.exists()
    monkeypatch.undo()
    made.run("run")
    monkeypatch.setattr(output_folder, "free_bytes", lambda layout: sizes[0])  # what is written already takes no more
    made.run("run")


def test_a_run_finds_a_linked_folder_first(workspace: Make) -> None:
    made = workspace({"a": samples(4)})
    (made.folder / "elsewhere").mkdir()
    made.root.mkdir()
    (made.root / "edits").symlink_to(made.folder / "elsewhere")
    done = made.run("run", check=False)
    assert (done.returncode, f"'{made.root}/edits' is a link" in done.stderr) == (2, True)
    assert sorted(path.name for path in made.root.iterdir()) == ["edits"]


@pytest.mark.parametrize("limit_mb", [400, 500, 600])
def test_a_limit_of_memory_ends_in_a_message(limit_mb: int, dataset: Workspace) -> None:
    """Libraries that find no room, and what they are short of later: never a traceback.

    The C library may end the process itself, in words of its own: where it does hangs on the machine.
    """
    line = f"ulimit -v {limit_mb * 1024}; export OPENBLAS_NUM_THREADS=1; $BUILDER sql 'select count(*) from samples'"
    done = _shell(f"{line} --pipeline {shlex.quote(str(dataset.file))}")
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode != 0 and "ABORT" not in done.stderr:
        assert done.returncode == 1, done.stderr
        assert "  fix: " in done.stderr


def test_a_library_that_finds_no_room_is_the_machine_s() -> None:
    from builder import machine

    for words in (
        "/x/_duckdb.so: failed to map segment from shared object", "libz.so.1: cannot allocate memory",
        "/x/y.so: cannot map zero-fill pages",
    ):  # fmt: skip
        told = machine.explained(ImportError(words))
        assert machine.is_out_of_memory(ImportError(words))
        assert told.fix
    assert not machine.is_of_the_machine(ImportError("No module named 'x'"))


# --- what a finished command points to ---


def test_what_is_printed_about_a_run_can_be_given_to_a_shell(
    workspace: Callable[..., Workspace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a root whose name has a space, the patterns find what the tasks of the run have left."""
    loaded = workspace({"a": samples(1)}).load()
    run = RunFiles(Layout(tmp_path / "a root"), "20260101T000000-mine-0a1b")
    for number in (0, 1):
        for path in (run.failures(number), run.result(number), run.log(number), run.task(number)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{path.name}\n")
    remarks = {"a": [f"remark {number}" for number in range(12)]}
    outcome = runs.Outcome(counts={"kept": 2}, run=run, remarks=remarks)
    outcomes.tell_outcome(loaded, "mine", outcome, Talk())
    said = capsys.readouterr().err
    [why] = re.findall(r"^  why: (cat .*)$", said, re.M)
    [rest] = re.findall(r"^and 2 more of these lines: 'remarks' in (.*)$", said, re.M)
    printed = [subprocess.check_output(command, shell=True, text=True) for command in (why, f"cat {rest}")]
    assert [text.split() for text in printed] == [
        ["00000.failures.jsonl", "00001.failures.jsonl"], ["00000.result.json", "00001.result.json"],
    ]  # fmt: skip
