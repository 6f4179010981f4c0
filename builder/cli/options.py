"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from builder.errors import ConfigError

if TYPE_CHECKING:
    from builder.verbs.pipeline import Pipeline

Command = TypeVar("Command", bound=Callable[..., Any])


class LocalPath(click.Path):
    """A path of the command line, `~` expanded where a shell leaves it, as in `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from builder.store.layout import local

        return super().convert(local(value) if isinstance(value, str) else value, param, ctx)


def pipeline_options(command: Command) -> Command:
    for option in (
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."),
        click.option("--pipeline", metavar="FILE", help="A pipeline file."),
        click.option("--scale", metavar="NAME", help="The pipeline of that name: small (the default) or large."),
    ):
        command = option(command)
    return command


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout, nothing else.")(command)


def choice_options(command: Command) -> Command:
    for option in (
        click.option("--where", metavar="SQL", help="Only rows for which this condition over samples holds."),
        click.option("--stale", is_flag=True, help="Rows whose inputs, stage version or options changed, too."),
        click.option("--redo", is_flag=True, help="Rows with an answer, too."),
        click.option(
            "--retry",
            metavar="CLASS",
            help="With 'failed', failed rows, too; with 'failed:timeout' those of that class of error alone.",
        ),
    ):
        command = option(command)
    return command


def load(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> Pipeline:
    from builder.config.loading import find_pipeline
    from builder.verbs.pipeline import load_pipeline

    if scale and pipeline:
        raise ConfigError("--scale and --pipeline both name a pipeline", fix="give one of them")
    loaded = load_pipeline(find_pipeline(scale, pipeline), sets, _named(scale, pipeline, sets))
    root = loaded.layout.root
    if root.exists() and not root.is_dir():
        raise ConfigError(
            f"dataset.root '{root}' is a file", where={"pipeline": loaded.config.path}, fix="name a folder, new or old"
        )
    return loaded


def _named(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> list[str]:
    """The options that name a pipeline, as they were given."""
    words = ["--pipeline", pipeline] if pipeline else ["--scale", scale] if scale else []
    for item in sets:
        words += ["--set", item]
    return words
