"""Options that several commands have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from builder.errors import ConfigError

if TYPE_CHECKING:
    from builder.verbs.pipeline import Pipeline

#: The commands that `pipeline_options` was put on, by name.
TAKING_A_PIPELINE: list[str] = []
#: A function under click's decorators: it gets its options by name.
Command = Callable[..., None]


class LocalPath(click.Path):
    """A path of the command line, `~` expanded where a shell leaves it, as in `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from builder.store.layout import local

        return super().convert(local(value) if isinstance(value, str) else value, param, ctx)


@dataclass(frozen=True)
class PipelineOptions:
    """The options that name a pipeline, as they were given."""

    scale: str | None
    pipeline: str | None
    sets: Sequence[str]

    def load(self) -> Pipeline:
        """The pipeline that they name.

        Raises:
            ConfigError: they name no pipeline or two, or it is wrong.
        """
        from builder.config.loading import find_pipeline
        from builder.verbs.pipeline import load_pipeline

        if self.scale and self.pipeline:
            raise ConfigError("--scale and --pipeline both name a pipeline", fix="give one of them")
        loaded = load_pipeline(find_pipeline(self.scale, self.pipeline), self.sets, self.words)
        root = loaded.layout.root
        if root.exists() and not root.is_dir():
            raise ConfigError(
                f"dataset.root '{root}' is a file",
                where={"pipeline": loaded.config.path},
                fix="name a folder; it may exist already",
            )
        return loaded

    @property
    def words(self) -> list[str]:
        """The options as words of a command line."""
        words = []
        if self.pipeline:
            words = ["--pipeline", self.pipeline]
        elif self.scale:
            words = ["--scale", self.scale]
        for item in self.sets:
            words += ["--set", item]
        return words


def pipeline_options(command: Command) -> Command:
    """Gives a command the options that name a pipeline, as the argument `named`."""

    @functools.wraps(command)
    def with_pipeline(scale: str | None, pipeline: str | None, sets: Sequence[str], **options: Any) -> None:
        command(named=PipelineOptions(scale, pipeline, sets), **options)

    TAKING_A_PIPELINE.append(command.__name__)
    for option in (
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."),
        click.option("--pipeline", metavar="FILE", help="A pipeline file."),
        click.option("--scale", metavar="NAME", help="The pipeline of that name: small (the default) or large."),
    ):
        with_pipeline = option(with_pipeline)
    return with_pipeline


def json_option(command: Command) -> Command:
    """Gives a command the flag `--json`, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout, nothing else.")(command)


def choice_options(command: Command) -> Command:
    """Gives a command the fields of `Choice` that options set, by name, as the argument `choice`."""

    @functools.wraps(command)
    def with_choice(retry: str | None, redo: bool, stale: bool, where: str | None, **options: Any) -> None:
        command(choice={"retry": retry, "redo": redo, "stale": stale, "where": where}, **options)

    for option in (
        click.option("--where", metavar="SQL", help="Only rows for which this condition over samples holds."),
        click.option("--stale", is_flag=True, help="Rows whose inputs, stage version or options changed, too."),
        click.option("--redo", is_flag=True, help="Rows with an answer, too."),
        click.option(
            "--retry",
            metavar="CLASS",
            help="With 'failed', failed rows too; with 'failed:timeout', only failed rows of that class of error.",
        ),
    ):
        with_choice = option(with_choice)
    return with_choice


def choice_words(choice: Mapping[str, Any]) -> list[str]:
    """The options of `choice_options` as words of a command line."""
    words = []
    for name, value in choice.items():
        if value is True:
            words.append(f"--{name}")
        elif value:
            words += [f"--{name}", value]
    return words
