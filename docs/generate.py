"""Writes docs/cli.md and docs/columns.md out of the code: commands, columns and configuration keys.

python docs/generate.py           write both
python docs/generate.py --check   write nothing; exit 1 if one differs from what the code says
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel

from builder.cli import main as command_line
from builder.config.sections import Run, StageTable, Write
from builder.sources.tars.section import FieldSpec, TarSection
from builder.stages.contract import Stage, columns_of
from builder.stages.finding import find
from builder.store import layout
from builder.table import schema

DOCS = Path(__file__).parent
#: The built-in stages in the order of the pipelines that come with builder.
STAGES = tuple(tomllib.loads((layout.installed("pipelines") / "small.toml").read_text("utf-8"))["stages"])
#: Parameters of all commands that work on a pipeline.
_SHARED = ("scale", "pipeline", "sets")
HEAD = "<!-- Written by docs/generate.py out of the code: edit that. -->\n"


# --- the command line ---


def cli_page() -> str:
    """Every command with its arguments, options and example."""
    commands = [(name, command) for name, command in command_line.commands.items() if not command.hidden]
    text, example = _help_of(command_line)
    lines = [HEAD, "# The command line", "", *text, "", *_block(example), ""]
    lines += _table(("command", "what it does"), [(f"[`{n}`](#{n})", _help_of(c)[0][0]) for n, c in commands])
    lines += ["", " ".join((command_line.epilog or "").split()), "", "## Which pipeline", ""]
    lines += ["Every command but `init` and `demo` works on a pipeline, which these options name:", ""]
    lines += _options(command_line.commands["run"].params)
    for name, command in commands:
        text, example = _help_of(command)
        own = [param for param in command.params if param.name not in _SHARED]
        lines += ["", f"## {name}", "", *_block([_usage(name, command)]), "", *text, "", *_options(own)]
        lines += ["", *_block(example)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _help_of(command: click.Command) -> tuple[list[str], list[str]]:
    """A docstring's paragraphs, and the lines of its example."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    text: list[str] = []
    example: list[str] = []
    for paragraph in paragraphs:
        if paragraph.startswith("\b"):
            example = [line[2:] for line in paragraph.splitlines()[2:]]
        else:
            text += ["", " ".join(paragraph.split())] if text else [" ".join(paragraph.split())]
    return text, example


def _usage(name: str, command: click.Command) -> str:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    shown = [p.human_readable_name if p.required else f"[{p.human_readable_name}]" for p in arguments]
    return " ".join(["builder", name, "[OPTIONS]", *shown])


def _options(params: Sequence[click.Parameter]) -> list[str]:
    rows = []
    for option in params:
        if isinstance(option, click.Option):
            value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"  # type: ignore[union-attr]
            default = f" Default: `{option.default}`." if option.show_default else ""
            rows.append((f"`{option.opts[0]}{value}`", (option.help or "") + default))
    return _table(("option", ""), rows) if rows else []


# --- columns and configuration ---


def columns_page() -> str:
    """Every column of the table and every key of a pipeline."""
    lines = [HEAD, "# Columns and configuration", ""]
    lines += ["What the table `samples` holds, and what a pipeline may say. Null means not computed, never no.", ""]
    lines += ["## Columns of ingest", "", *_columns((*schema.IDENTITY, *schema.status_columns(schema.SOURCE))), ""]
    lines += ["json fields that a pipeline carries with `dataset.fields` have these types; any other is text, unless"]
    lines += ["it is written `{name = ..., type = ...}`. A field whose name the table has already gets `json_` in"]
    lines += ["front: " + ", ".join(_renamed()) + ".", ""]
    lines += _table(("field", "type"), [(f"`{n}`", schema.type_text(kind)) for n, kind in schema.FIELD_TYPES.items()])
    for name in STAGES:
        kind = find(name)
        lines += ["", f"## Columns of {name}", "", _first_line(kind), ""]
        lines += _columns(columns_of(kind))
    lines += ["", "## Configuration", "", "Keys of a pipeline file, section by section.", ""]
    for title, model, prefix in _sections():
        lines += [f"### {title}", "", *_keys(model, prefix), ""]
    return "\n".join(lines).rstrip() + "\n"


def _renamed() -> list[str]:
    columns = schema.field_columns(schema.FIELD_TYPES)
    return [f"`{c.name}`" for name, c in zip(schema.FIELD_TYPES, columns, strict=True) if c.name != name]


def _sections() -> Iterator[tuple[str, type[BaseModel], str]]:
    yield "[dataset]", TarSection, "dataset"
    yield "an entry of dataset.fields", FieldSpec, "dataset.fields"
    yield "[run], and [stages.NAME.run] for one stage", Run, "run"
    yield "[stages.NAME]: keys that every stage has", StageTable, "stages.NAME"
    for name in STAGES:
        yield f"[stages.{name}]", find(name).Options, f"stages.{name}"
    yield "[write]", Write, "write"


def _columns(columns: Iterable[schema.Column]) -> list[str]:
    rows = [(f"`{column.name}`", f"`{schema.type_text(column.type)}`", column.meaning) for column in columns]
    return _table(("column", "type", "meaning"), rows)


def _first_line(kind: type[Stage]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").splitlines()[0]


def _keys(model: type[BaseModel], prefix: str) -> list[str]:
    docs = {name: doc for base in reversed(_models(model)) for name, doc in field_docs(base).items()}
    rows = []
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else _value(info.get_default(call_default_factory=True))
        rows.append((f"`{prefix}.{info.alias or name}`", _type(info.annotation), default, docs[name]))
    return _table(("key", "type", "default", "meaning"), rows)


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and those that it takes fields from."""
    return [base for base in model.__mro__ if issubclass(base, BaseModel) and base not in BaseModel.__mro__]


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The `#:` comment above each field that a model has of its own; one covers the fields that follow line by line.

    Raises:
        SystemExit: a field has none.
    """
    lines, start = inspect.getsourcelines(model)
    [node] = ast.parse(textwrap.dedent("".join(lines))).body
    assert isinstance(node, ast.ClassDef)
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    docs: dict[str, str] = {}
    before, doc = 0, ""
    for item in fields:
        assert isinstance(item.target, ast.Name)
        comment: list[str] = []
        at = item.lineno - 2
        while lines[at].strip().startswith("#:"):
            comment.insert(0, lines[at].strip().removeprefix("#:").strip())
            at -= 1
        if comment:
            doc = " ".join(comment)
        elif before != item.lineno - 1:
            raise SystemExit(
                f"{model.__module__}, line {start + item.lineno - 1}: '{item.target.id}' has no #: comment"
            )
        docs[item.target.id] = doc
        before = item.end_lineno or item.lineno
    return docs


def _type(annotation: Any) -> str:
    """A field's type in the words of TOML."""
    plain = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "", Any: "any"}
    if annotation in plain:
        return plain[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(f"{name} = ..." for name in annotation.model_fields) + "}"
    parts = get_args(annotation)
    if str(annotation).startswith("typing.Literal"):
        return " or ".join(f"`{json.dumps(part)}`" for part in parts)
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    origin = getattr(annotation, "__origin__", None)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "section"
    return " or ".join(filter(None, map(_type, parts)))


def _value(default: Any) -> str:
    return "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`"


# --- text ---


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_escaped, cells)) + " |"

    return [line(names), "|" + "---|" * len(names), *(line(row) for row in rows)]


def _escaped(cell: str) -> str:
    """A cell in which Markdown finds nothing but its `code`."""
    parts = cell.replace("|", "\\|").split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("__", "\\_\\_") for part in parts[::2]]
    return "`".join(parts)


def _block(lines: Sequence[str]) -> list[str]:
    return ["```", *lines, "```"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/cli.md and docs/columns.md out of the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one is out of date")
    options = parser.parse_args()
    late = []
    for name, text in (("cli.md", cli_page()), ("columns.md", columns_page())):
        path = DOCS / name
        if path.exists() and path.read_text("utf-8") == text:
            continue
        late.append(name)
        if not options.check:
            path.write_text(text, "utf-8")
            print(f"written docs/{name}")
    if options.check and late:
        sys.exit(f"out of date: {', '.join('docs/' + name for name in late)}\n  fix: python docs/generate.py")


if __name__ == "__main__":
    main()
