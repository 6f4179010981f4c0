"""How a command reports that it failed: its exit code, and the error as a message or as json."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from builder import exit_codes
from builder.cli.options import TAKING_A_PIPELINE
from builder.cli.output import hint
from builder.errors import BuilderError, ConfigError, SchemaError, described

if TYPE_CHECKING:
    from builder.verbs.pipeline import Pipeline

#: The text about `builder.exit_codes` in `--help`.
EXIT_CODES = f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in exit_codes.MEANINGS.items())}."


def names_a_command(text: str) -> bool:
    """Whether a text has a builder command that takes the options of a pipeline."""
    return re.search(rf"\bbuilder ({'|'.join(TAKING_A_PIPELINE)})\b(?! --help)", text) is not None


def name_pipeline(error: BuilderError, arguments: Sequence[str]) -> None:
    """Adds to an error's fix the pipeline options that its commands need, if they were given this time."""
    given = _pipeline_words(arguments)
    is_said = all(shlex.quote(word) in error.fix for word in given)
    if given and names_a_command(error.fix) and not is_said:
        error.fix += f" (each builder command with {shlex.join(given)})"


def options_for(loaded: Pipeline, texts: Iterable[str]) -> str:
    """A note for builder commands in texts that name no pipeline; empty if there are none."""
    is_needed = loaded.named and any(map(names_a_command, texts))
    return f"(each builder command with {shlex.join(loaded.named)})" if is_needed else ""


def _pipeline_words(arguments: Sequence[str]) -> list[str]:
    """The options of a command line that name its pipeline, as they were given."""
    found: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--pipeline", "--scale", "--set"):
            found += [word, next(words, "")]
        elif word.startswith(("--pipeline=", "--scale=", "--set=")):
            found.append(word)
    return found


def fail(error: BuilderError, as_json: bool) -> NoReturn:
    """Ends the command: the error as a message on stderr, or as one JSON value on stdout."""
    if as_json:
        _print_json(error.to_json())
    else:
        hint(f"error: {error}")
    sys.exit(exit_codes.USAGE if isinstance(error, ConfigError | SchemaError) else exit_codes.UNFINISHED)


def stop(as_json: bool) -> NoReturn:
    """Ends a command that was asked to stop, as `fail` does."""
    fix = "everything committed is kept; run the same command again to continue"
    if as_json:
        _print_json(described("Interrupted", "stopped", {}, fix))
    else:
        click.echo(f"\nstopped: {fix}", err=True)
    sys.exit(exit_codes.INTERRUPTED)


def _print_json(error: dict[str, Any]) -> None:
    click.echo(json.dumps({"error": error}))
