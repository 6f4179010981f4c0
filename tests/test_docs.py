"""Docs say what the code says; what they show runs and prints what they show."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest import mock

import click
import pytest

from builder import __version__
from builder.cli import main
from builder.config.problems import keys_of
from builder.config.sections import Run, StageTable, Strict, Write
from builder.demo.shards import make_demo_shards
from builder.sources.tars.section import TarSection
from builder.stages.contract import columns_of
from builder.stages.finding import built_in, find
from builder.table import schema
from support.here import builder_here

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text("utf-8")
STAGES = tuple(built_in())
COMMANDS = {name: command for name, command in main.commands.items() if not command.hidden}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=200)


def blocks(kind: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- written out of the code ---


def test_generated_docs_are_up_to_date() -> None:
    done = python(DOCS / "generate.py", "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_generated_docs_that_are_late_are_told_and_written(tmp_path: Path) -> None:
    for name in ("generate.py", "cli.md", "columns.md"):
        shutil.copy(DOCS / name, tmp_path)
    with (tmp_path / "cli.md").open("a") as file:
        file.write("by hand\n")
    done = python(tmp_path / "generate.py", "--check")
    assert done.returncode == 1
    assert done.stderr == "out of date: docs/cli.md\n  fix: python docs/generate.py\n"
    assert python(tmp_path / "generate.py").stdout == "written docs/cli.md\n"
    assert python(tmp_path / "generate.py", "--check").returncode == 0
    assert (tmp_path / "cli.md").read_text("utf-8") == (DOCS / "cli.md").read_text("utf-8")


def test_a_key_without_a_comment_is_refused() -> None:
    class Documented(Strict):
        #: One.
        one: int = 1
        #: Two of a kind.
        two: int = 2
        three: int = 3

    class Bare(Strict):
        #: One.
        one: int = 1

        two: int = 2

    field_docs = generator().field_docs
    assert field_docs(Documented) == {"one": "One.", "two": "Two of a kind.", "three": "Two of a kind."}
    with pytest.raises(SystemExit, match="'two' has no #: comment"):
        field_docs(Bare)


def test_every_command_and_option_is_in_the_docs() -> None:
    text = (DOCS / "cli.md").read_text("utf-8")
    for name, command in COMMANDS.items():
        assert f"\n## {name}\n" in text
        section = (
            text.split(f"\n## {name}\n")[1].split("\n## ")[0] + text.split("\n## Which pipeline\n")[1].split("\n## ")[0]
        )
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"| `{option.opts[0]}" in section, f"{name} {option.opts[0]}"


def test_every_column_is_in_the_docs_with_a_meaning() -> None:
    text = (DOCS / "columns.md").read_text("utf-8")
    columns = [*schema.IDENTITY, *schema.status_columns(schema.SOURCE)]
    columns += [column for stage in STAGES for column in columns_of(find(stage))]
    for column in columns:
        assert column.meaning, column.name
        assert f"| `{column.name}` | `{schema.type_text(column.type)}` | " in text, column.name
    for name in schema.FIELD_TYPES:
        assert f"| `{name}` | " in text, name


def test_every_configuration_key_is_in_the_docs_with_a_meaning() -> None:
    text = (DOCS / "columns.md").read_text("utf-8")
    models = {"dataset": TarSection, "run": Run, "write": Write, "stages.NAME": StageTable}
    models |= {f"stages.{name}": find(name).Options for name in STAGES}
    for prefix, model in models.items():
        for name in keys_of(model):
            row = re.search(rf"^\| `{re.escape(prefix)}\.{name}` \| .* \| (.*) \|$", text, re.M)
            assert row, f"{prefix}.{name}"
            assert row[1].strip(), f"{prefix}.{name}"


# --- written by hand ---


def test_links_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_tests_that_the_docs_name_exist() -> None:
    missing = []
    text = (DOCS / "reliability.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    for file, name in named:
        path = ROOT / "tests" / file
        if not path.exists() or (name and f"def {name}(" not in path.read_text("utf-8")):
            missing.append(f"{file}::{name}")
    assert missing == []
    assert len(named) > 80


def test_what_the_page_for_changes_names_is_there() -> None:
    text = (DOCS / "changing.md").read_text("utf-8")
    for path in re.findall(r"`((?:builder|sql|tests)/[\w/]*(?:\.\w+)?)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text):
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert f"def {name}" in source, f"{file}::{name}"


def test_decisions_are_numbered_and_whole() -> None:
    pages = sorted((DOCS / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{i:04d}" for i in range(1, len(pages) + 1)]
    for number, page in enumerate(pages, 1):
        text = page.read_text("utf-8")
        assert text.startswith(f"# {number}. ")
        places = [text.find(f"\n**{part}.**") for part in ("Context", "Choice", "Rejected")]
        assert -1 not in places, page.name
        assert places == sorted(places), page.name


def test_the_words_of_the_glossary_are_sorted_by_use_and_unique() -> None:
    words = re.findall(r"^\| ([^|]+) \| [^|]", (DOCS / "glossary.md").read_text("utf-8"), re.M)[1:]
    single = [word for entry in words for word in entry.split(", ")]
    assert len(single) == len(set(single)) > 25


def test_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    heads = re.findall(r"^## (.*)$", text, re.M)
    released = [head for head in heads if not head.startswith("Unreleased")]
    assert heads[0] == f"Unreleased: {__version__}" or released[0].startswith(f"{__version__} - ")
    assert re.findall(r"^- \*\*([A-Z ]+)\*\*:", text, re.M) == ["TABLE FORMAT", "SHARD BYTES", "CONFIG", "CLI"]
    tags = set(re.findall(r"^- \*\*([A-Z ]+)\*\* ", text, re.M))
    assert tags <= {"TABLE FORMAT", "SHARD BYTES", "CONFIG", "CLI"}


# --- commands that are shown ---


def shown_commands() -> list[tuple[str, str]]:
    """(where, command line) of every `builder ...` in help texts, README, pages and comments of files to copy."""
    found = [("help", line.strip()) for command in COMMANDS.values() for line in (command.help or "").splitlines()]
    found += [("help", line.strip()) for line in (main.help or "").splitlines()]
    texts = {"README.md": "".join(blocks("console") + blocks("sh"))}
    for path in [*(ROOT / "pipelines").glob("*.toml"), *EXAMPLES]:
        texts[path.name] = re.sub(r"^#? *", "", path.read_text("utf-8"), flags=re.M)
    for name, text in texts.items():
        found += [(name, line.strip().removeprefix("$ ")) for line in text.splitlines()]
    return [(name, line) for name, line in found if re.match(r"builder [a-z]+( |$)", line)]


def parse(line: str) -> None:
    """Lets click take a command line apart without doing anything.

    Raises:
        click.UsageError: there is no such command, option or argument.
    """
    words = shlex.split(
        re.split(r"\s+#|\s{2,}|;|&&|\|", line)[0] if "'" not in line and '"' not in line else line, comments=True
    )
    if words[1] not in COMMANDS:
        raise click.UsageError(f"no command '{words[1]}'")
    COMMANDS[words[1]].make_context(words[1], words[2:], resilient_parsing=False)


def test_every_shown_command_is_one() -> None:
    lines = shown_commands()
    assert {name for name, _ in lines} >= {"help", "README.md", "small.toml", "large.toml", "write_a_stage.py"}
    assert len(lines) > 40
    for name, line in lines:
        try:
            parse(line)
        except click.UsageError as error:
            pytest.fail(f"{name}: {line}\n{error.format_message()}")


@pytest.mark.parametrize("line", ["builder stag faces", "builder stage faces --scal small", "builder show"])
def test_a_shown_command_that_is_none_would_be_told(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


def test_make_targets_and_extras_that_are_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"\$ make (\w+)", README)
    assert targets[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])
    shown = set(
        re.findall(
            r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", README.split("## Install")[1].split("## The")[0], re.M))
        )
    )
    assert shown == known
    for extras in re.findall(r"pip install '[\w.-]+\[([\w,]+)\]'", README):
        assert set(extras.split(",")) <= known


def test_toml_that_is_shown_is_toml() -> None:
    assert [tomllib.loads(block) for block in blocks("toml")] == [
        {"stages": {"brightness": {"python": "my_stage.py:Brightness", "sql": "my_stage.sql"}}}
    ]


def timeless(text: str) -> str:
    """Output without times, rates and sizes that depend on the machine."""
    text = re.sub(r"\d+\.\d s\b", "T s", text)
    text = re.sub(r"\d[\d.e+-]* (rows|shards)/s", r"N \1/s", text)
    text = re.sub(r"(?<=  seconds ).*", lambda match: re.sub(r"\d+\.\d", "T", match[0]), text)
    return re.sub(r"(bytes proven the source's )[\d,]+ of [\d,]+", r"\1N of N", text).rstrip()


def test_readme_is_what_happens(tmp_path: Path) -> None:
    """The demo and every question print what README.md shows, and its Python runs, in the folder of the demo."""
    path = os.pathsep.join(map(str, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "PATH": str(tmp_path / "no builder here")}
    start = "import sys\nfrom builder.cli import main\nsys.argv[0] = '.venv/bin/builder'\nmain()"  # as make starts it
    ran = 0
    for block in blocks("console"):
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M):
            if command == "make test":
                continue
            if command == "make demo":
                words = [sys.executable, "-c", start, "demo", "--out", "demo"]
                done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
            else:
                done = builder_here(*shlex.split(command)[1:], cwd=tmp_path)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            printed = done.stderr + done.stdout if command == "make demo" else done.stdout
            assert timeless(printed) == timeless(shown), command
            ran += 1
    assert ran == 6
    python_blocks = blocks("python")
    assert len(python_blocks) == 5
    for block in python_blocks:
        out = io.StringIO()
        with chdir(tmp_path), redirect_stdout(out):
            exec(block, {"__name__": "__main__"})
        assert out.getvalue(), block


# --- examples ---


def test_examples_are_four_and_short() -> None:
    assert [path.name for path in EXAMPLES] == [
        "edit_captions.py", "ingest_and_ask.py", "small_pipeline.py", "write_a_stage.py",
    ]  # fmt: skip
    for path in EXAMPLES:
        assert len(path.read_text("utf-8").splitlines()) < 60, path.name


def example(name: str, *arguments: Path) -> str:
    """Runs an example in this process, its commands too; returns what they print."""
    out = io.StringIO()

    def run(words: Sequence[str | Path], *, check: bool) -> None:
        assert [*words[:3], check] == [sys.executable, "-m", "builder", True]
        done = builder_here(*map(str, words[3:]))
        assert done.returncode == 0, done.stderr
        out.write(done.stdout)

    words = [name, *map(str, arguments)]
    with mock.patch.object(subprocess, "run", run), mock.patch.object(sys, "argv", words), redirect_stdout(out):
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return out.getvalue()


def test_example_ingest_and_ask(tmp_path: Path) -> None:
    printed = example("ingest_and_ask.py", tmp_path)
    assert "│ 00000000 ┆ 20      ┆ 20       │" in printed
    assert re.search(r"^longest caption: \w", printed, re.M)
    assert re.search(r"^its image: \d{4,} bytes$", printed, re.M)


def test_example_edit_captions(tmp_path: Path) -> None:
    printed = example("edit_captions.py", tmp_path)
    assert re.findall(r"shards proven +2 of 2|samples swapped +[1-9]\d*", printed)[1:]


def test_example_small_pipeline(tmp_path: Path) -> None:
    printed = example("small_pipeline.py", tmp_path)
    assert "shards proven              2 of 2" in printed
    assert printed.count("An oil painting of") >= 5


def test_example_write_a_stage(tmp_path: Path) -> None:
    make_demo_shards(tmp_path / "source", samples=12)
    pipeline = ("--pipeline", "examples/write_a_stage.toml", "--set", f"dataset.shards={tmp_path}/source/*.tar")
    pipeline = (*pipeline, "--set", f"dataset.root={tmp_path}/out")
    assert python("-m", "builder", "run", *pipeline, cwd=ROOT).returncode == 0
    sql = "select count(*) as n, min(brightness) > 0.05 as low, max(brightness) < 0.95 as high from samples"
    assert builder_here("sql", sql, *pipeline, "--csv", cwd=ROOT).stdout == "n,low,high\n12,true,true\n"
    source = sorted((tmp_path / "source").glob("*.tar"))
    assert [(tmp_path / "out/shards" / path.name).read_bytes() == path.read_bytes() for path in source] == [True, True]
