"""Deals with the shell around a command: streams that may be closed, encodings, and misspelt words.

Knows no command.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

import click

from builder.errors import ConfigError


class _Steady(io.FileIO):
    """A standard stream whose reader may exit, as `| head -1` does: what is written after that is discarded.

    What stderr cannot write for any other reason, such as a full disk, is discarded too: nobody could read an error.
    """

    def write(self, data: object, /) -> int:
        try:
            return int(super().write(data) or 0)  # type: ignore[arg-type]
        except OSError as error:
            if self.fileno() != 2 and not isinstance(error, BrokenPipeError):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data))  # type: ignore[arg-type]


def steady_streams() -> None:
    """Makes standard streams that raise no error when they are closed; no file opened later takes their place.

    The work of a command matters more than its output, so it continues when nobody reads it. A full disk behind
    stdout is still an error.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(nowhere, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        encoding = getattr(old, "encoding", None) or "utf-8"
        raw = io.BufferedWriter(_Steady(number, "w", closefd=False))
        at_once = name == "stderr" or os.isatty(number)
        # A caption that the terminal cannot show must not raise either.
        new = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=at_once)
        setattr(sys, name, new)


def let_go_of_stdout() -> None:
    """Discards what stdout cannot write: the interpreter would try again at its exit, and fail."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def in_utf8() -> None:
    """Starts this command again in UTF-8 mode if Python uses another encoding for file names.

    pyarrow, DuckDB and others accept only UTF-8. The output keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding().replace("-", "") == "utf8" or not sys.executable:
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{getattr(sys.stdout, 'encoding', None) or 'ascii'}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


# --- words that are misspelt ---

#: Options that a command lacks but another one has, and what to write instead.
ELSEWHERE: Mapping[tuple[str, str], str] = {
    ("run", "--dry-run"): "builder plan shows what a run would do, and starts nothing",
    ("stage", "--dry-run"): "builder plan shows what a stage would do, and starts nothing; --try 20 shows some answers",
    ("write", "--dry-run"): "builder plan shows what would be written, and starts nothing",
    ("ingest", "--dry-run"): "builder plan shows what would be read, and starts nothing",
    ("run", "--stale"): "stage by stage: builder stage NAME --stale, then builder run; builder plan --stale counts",
    ("run", "--redo"): "stage by stage: builder stage NAME --redo, then builder run; for shards builder ingest --redo",
    ("run", "--retry"): "stage by stage: builder stage NAME --retry failed, then builder run",
    ("run", "--where"): "stage by stage: builder stage NAME --where SQL; or the stage's own SQL, for every run",
    ("run", "--try"): "stage by stage: builder stage NAME --try 20",
    ("run", "--json"): "builder status --json and builder plan --json",
    ("run", "--workers"): "--set run.workers=4, or [run] in the pipeline",
    ("stage", "--workers"): "--set run.workers=4, or [run] in the pipeline",
    ("stage", "--force"): "--redo: rows with an answer too",
    ("ingest", "--force"): "--redo: every shard again",
    ("write", "--force"): "a shard that is up to date would be the same again; builder verify proves it",
    ("write", "--redo"): "a shard that is up to date would be the same again; builder verify proves it",
    ("write", "--stale"): "builder write writes all that is not up to date, and nothing else",
}  # fmt: skip
#: Commands by the names that other tools give them.
ALIASES: Mapping[str, str] = {
    "query": "sql", "select": "sql", "stats": "status", "info": "status", "ls": "status", "clean": "gc", "prune": "gc",
    "check": "verify", "validate": "verify", "export": "write", "generate": "stage generate", "faces": "stage faces",
    "prompts": "stage prompts", "lang": "stage lang", "new": "init", "start": "run", "resume": "run",
    "continue": "run", "dry-run": "plan", "inspect": "show", "retry": "stage NAME --retry failed",
}  # fmt: skip


def no_command(name: str, commands: Sequence[str]) -> ConfigError:
    """The error for an unknown command."""
    near = difflib.get_close_matches(name, [*commands, "help", "version", *ALIASES], 1)
    meant = ALIASES.get(near[0], near[0]) if near else None
    return ConfigError(
        f"there is no command '{name}'",
        where={"commands": ", ".join(commands)},
        fix=f"did you mean: builder {meant}" if meant else "builder help describes each of them",
    )


def misused(error: click.UsageError) -> ConfigError:
    """click's error about a command line, in the form of every other error."""
    context = error.ctx
    if context is None:
        return ConfigError(_sentence(error), fix="builder help")
    path, name = context.command_path, context.info_name or ""
    place = {"usage": context.command.get_usage(context).partition(": ")[2]}
    more = f"{path} --help"
    if isinstance(error, click.NoSuchOption):
        options = [option for param in context.command.params for option in param.opts]
        near = difflib.get_close_matches(error.option_name, options, 1, 0.75)
        fix = ELSEWHERE.get((name, error.option_name)) or (f"did you mean {near[0]}?" if near else more)
        if isinstance(context.command, click.Group) and _takes(context.command, error.option_name):
            fix = f"put options after the command: builder COMMAND {error.option_name} ..."
        shown = ", ".join(option for option in options if option.startswith("--"))
        return ConfigError(f"{path} has no option {error.option_name}", where={"its options": shown}, fix=fix)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        needed = error.param.make_metavar(context)
        return ConfigError(f"{path} needs {needed}", where=place, fix=_example(context) or more)
    if extra := re.match(r"Got unexpected extra arguments? \((.*)\)$", error.message):
        words = extra[1].split()
        return ConfigError(f"{path} has too many words: '{extra[1]}'", where=place, fix=_of_extra(name, words) or more)
    return ConfigError(_sentence(error), where=place, fix=more)


def _takes(group: click.Group, option: str) -> bool:
    """Whether a command of a group has an option."""
    return any(option in param.opts for command in group.commands.values() for param in command.params)


def _sentence(error: click.UsageError) -> str:
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


def _example(context: click.Context) -> str:
    """The first example of a command's help."""
    lines = [line.strip() for line in (context.command.help or "").splitlines()]
    return next((line for line in lines if line.startswith(f"{context.command_path} ")), "")


def _of_extra(name: str, words: Sequence[str]) -> str:
    """What the extra words were probably meant as."""
    if name == "sql":
        return 'put the SQL in quotes: builder sql "select count(*) from samples"'
    if words[0].endswith(".toml"):
        return f"name the pipeline with --pipeline {shlex.quote(words[0])}"
    if words[0] in ("small", "large"):
        return f"name the pipeline with --scale {words[0]}"
    if words[0].endswith(".tar"):
        return "name shards in the pipeline, or in quotes: --set 'dataset.shards=DIR/*.tar'"
    if name in ("run", "plan"):
        return f"one stage alone: builder stage {shlex.quote(words[0])}"
    return ""
