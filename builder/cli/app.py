"""The command line: parse, call, print. Data to stdout, messages to stderr.

Heavy modules are imported inside the commands, so that `--help` starts at once."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from builder import __version__, exit_codes
from builder.cli import console
from builder.cli.care import drop, fold, gc
from builder.cli.checks import regen, verify
from builder.cli.failures import EXIT_CODES, fail, name_pipeline, stop
from builder.cli.output import hint
from builder.cli.questions import plan, show, sql, status
from builder.cli.work import demo, ingest, init, run, stage, task, write
from builder.errors import BuilderError, StageError


class _Group(click.Group):
    """Commands in the order of their work; errors as messages, or as one JSON value with `--json`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0].startswith("-") or args[0] in self.commands:
            return super().resolve_command(context, args)
        raise console.no_command(args[0], [name for name, command in self.commands.items() if not command.hidden])

    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        if args is None:
            console.in_utf8()
            console.steady_streams()
        arguments = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in arguments
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a caption that the terminal cannot show must not raise
        if arguments[:1] != ["task"]:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM acts like Ctrl-C
        try:
            try:
                sys.exit(super().main(arguments, prog_name="builder", standalone_mode=False))
            finally:
                sys.stdout.flush()  # a full disk is reported here, not by the interpreter at its exit
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "")
            sys.exit(exit_codes.USAGE)
        except (click.UsageError, BuilderError) as error:
            shown = console.misused(error) if isinstance(error, click.UsageError) else error
            name_pipeline(shown, arguments)
            fail(shown, as_json)
        except (click.Abort, KeyboardInterrupt):
            stop(as_json)
        except Exception as error:
            from builder import machine

            console.let_go_of_stdout()
            if not isinstance(error, OSError) and not machine.is_of_the_machine(error):
                if as_json:
                    fail(StageError(f"{type(error).__name__}: {error}", fix="run it without --json to see where"), True)
                hint(traceback.format_exc().rstrip("\n"))
                sys.exit(exit_codes.UNFINISHED)
            fail(machine.explained(error), as_json)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="builder")
def main() -> None:
    """Image-text tar shards in, hybrid shards out.

    One table, one row per sample. `ingest` reads shards into it, every `stage` adds columns, SQL picks the rows, and
    `write` streams the shards again with the chosen samples swapped.

    \b
    Example:
      builder init mine && cd mine
      builder run --scale small --set dataset.shards="/data/shards/*.tar"
    """


for command in (init, ingest, stage, run, write, plan, status, sql, show, regen, verify, gc, fold, drop, demo, task):
    main.add_command(command)


@main.command("help", hidden=True)
@click.argument("command", required=False)
@click.pass_context
def help_(context: click.Context, command: str | None) -> None:
    """Show what a command does; without a name, all commands.

    \b
    Example:
      builder help run
    """
    assert context.parent is not None
    if command is None:
        click.echo(context.parent.get_help())
        return
    name, found, _ = main.resolve_command(context.parent, [command])
    assert found is not None
    click.echo(found.get_help(click.Context(found, info_name=name, parent=context.parent)))


@main.command(hidden=True)
def version() -> None:
    """Show the version, as builder --version does."""
    click.echo(f"builder, version {__version__}")
