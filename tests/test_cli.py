"""The command line as people and scripts meet it: what it prints on which stream, and its exit codes."""

from __future__ import annotations

import json
import os
import resource
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

from builder import cli
from conftest import STAGES, Sample, Workspace, builder, make_shard, picture, samples
from stages import cannot

Make = Callable[..., Workspace]
COMMANDS = {name: command for name, command in cli.main.commands.items() if not command.hidden}
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
    result = CliRunner().invoke(cli.main, list(arguments))
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
    """A workspace with one stage of tests/stages.py; ingested."""

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
    untried = {"ok": 0, "failed": 0, "not_tried": 16, "errors": []}
    assert done.code == 0
    assert done.json() == {
        "root": str(dataset.root),
        "shards": 2,
        "healed": 0,
        "stages": {
            "source": {"ok": 16, "failed": 0, "not_tried": 0, "errors": []},
            **dict.fromkeys(("faces", "lang", "prompts", "generate"), untried),
        },
        "rows": 16,
        "notes": {"rows": 0, "example": None},
        "no_sample": [],
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
    nothing = {"covered": 0, "todo": 0, "ok": 0, "failed": 0, "outside": 0, "shards": 0}
    assert value == {
        "ingest": {"shards": 2, "todo": 0, "missing": [], "vanished": []},
        "older": [],
        "stages": {
            "faces": {"covered": 16, "todo": 16, "ok": 0, "failed": 0, "outside": 0, "shards": 2},
            "lang": {"covered": 16, "todo": 16, "ok": 0, "failed": 0, "outside": 0, "shards": 2},
            "prompts": nothing,
            "generate": nothing,
        },
        "write": {"shards": 2, "todo": 2, "edited": 0, "dropped": 0, "stale": 0, "refused": 0},
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
            {"class": "ConfigError", "what": "Missing argument 'QUESTION'.", "where": {}, "fix": "builder sql --help"},
        ),
        (
            ("status", "--sett", "x"), 2,
            {
                "class": "ConfigError", "what": "No such option '--sett'. Did you mean '--set'?", "where": {},
                "fix": "builder status --help",
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
                "fix": "give a uid of the table (builder sql 'select uid from samples limit 5'), or SHARD:ROW",
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
    assert done.json()["error"]["class"] in ("StageError", "TransientError")


def test_json_from_a_process_is_all_there_is(dataset: Workspace) -> None:
    """As a script runs it: no warning of a library slips onto either stream."""
    for arguments in (("status",), ("plan",), ("sql", "select 1"), ("show", "00000000:0"), ("verify",)):
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
    assert done.err.endswith("Error: No such command 'nothing'.\n")
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
    assert talk.splitlines()[-1] == "stopped: everything committed is kept; run the same command again to go on"
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
            "  fix: name a folder, new or old\n",
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
        "stage     covered  ok  failed  to do  in shards  ok, not covered now",
        "--------  -------  --  ------  -----  ---------  -------------------",
        "faces          16   0       0     16          2                    0",
        "lang           16   0       0     16          2                    0",
        "prompts         0   0       0      0          0                    0",
        "generate        0   0       0      0          0                    0",
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
        "  shards that the pipeline names    1",
        "  new or changed, to read           0",
        "  named and not there               1",
        "  in the table, not named any more  1",
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
    assert done.err.splitlines()[-1] == f"Error: Invalid value for 'FOLDER': Directory '{tmp_path}/mine' is a file."


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
        f"error: the table has no column 'nothing'\n  root: {dataset.root}\n  fix: builder sql 'describe samples'\n"
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
    cli.print_table(
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
