"""The command line: parse, call, print. Data to stdout, talk to stderr.

Heavy modules are imported inside the commands, so that `--help` starts at once.
"""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from builder import __version__
from builder.cli import console
from builder.errors import BuilderError, ConfigError, SchemaError, StageError
from builder.progress import Talk, plain, plain_lines

if TYPE_CHECKING:
    from builder.engine.runs import Outcome
    from builder.verbs.pipeline import Pipeline

EXIT_DONE, EXIT_UNFINISHED, EXIT_USAGE, EXIT_FAILED_ROWS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
_EXIT_CODES = (
    "Exit codes: 0 done; 1 it did not finish; 2 usage or a bad pipeline file; 3 done, but this command's own work left "
    "failed rows or refused shards; 130 interrupted."
)
#: A cell of a printed table, and a value of a shown sample, are cut at so many characters.
_CELL, _VALUE = 100, 1000
#: Names that a line lists before it only counts the others.
_EXAMPLES = 3
#: Remarks about shards that an ingest prints.
_REMARKS = 10

Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Commands in the order of their work, and errors as messages, or as one JSON value where `--json` is given."""

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
                stream.reconfigure(errors="backslashreplace")  # a caption that the terminal cannot show is no error
        if arguments[:1] != ["task"]:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends is Ctrl-C too
        try:
            try:
                sys.exit(super().main(arguments, prog_name="builder", standalone_mode=False))
            finally:
                sys.stdout.flush()  # a full disk behind it is told here, and not by the interpreter at its end
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "")
            sys.exit(EXIT_USAGE)
        except (click.UsageError, BuilderError) as error:
            told = console.misused(error) if isinstance(error, click.UsageError) else error
            _with_pipeline(told, arguments)
            _fail(told, as_json)
        except (click.Abort, KeyboardInterrupt):
            fix = "everything committed is kept; run the same command again to go on"
            if as_json:
                click.echo(json.dumps({"error": {"class": "Interrupted", "what": "stopped", "where": {}, "fix": fix}}))
            else:
                click.echo(f"\nstopped: {fix}", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:
            from builder import machine

            console.let_go_of_stdout()
            if not isinstance(error, OSError) and not machine.is_of_the_machine(error):
                if as_json:
                    _fail(
                        StageError(f"{type(error).__name__}: {error}", fix="run it without --json to see where"), True
                    )
                _hint(traceback.format_exc().rstrip("\n"))
                sys.exit(EXIT_UNFINISHED)
            _fail(machine.told(error), as_json)


#: A command of ours inside a sentence, that a pipeline's options belong to.
_COMMAND = re.compile(r"\bbuilder (ingest|stage|run|write|plan|status|sql|show|regen|verify|gc|fold|drop)\b(?! --help)")


def _with_pipeline(error: BuilderError, arguments: Sequence[str]) -> None:
    """Says which options the commands in an error's advice take, where they were needed this time."""
    given = _pipeline_words(arguments)
    is_said = all(shlex.quote(word) in error.fix for word in given)
    if given and _COMMAND.search(error.fix) and not is_said:
        error.fix += f" (each builder command with {shlex.join(given)})"


def _options_of(loaded: Pipeline, texts: Iterable[str]) -> str:
    """What to say of the commands in texts that name no pipeline; empty where there is none."""
    is_needed = loaded.named and any(_COMMAND.search(text) for text in texts)
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


def _fail(error: BuilderError, as_json: bool) -> NoReturn:
    if as_json:
        place = {name: str(value) for name, value in error.where.items()}
        told = {"class": type(error).__name__, "what": error.what, "where": place, "fix": error.fix}
        click.echo(json.dumps({"error": told}))
    else:
        _hint(f"error: {error}")
    sys.exit(EXIT_USAGE if isinstance(error, ConfigError | SchemaError) else EXIT_UNFINISHED)


class _LocalPath(click.Path):
    """A path of the command line, `~` expanded where a shell leaves it, as in `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from builder.store.layout import local

        return super().convert(local(value) if isinstance(value, str) else value, param, ctx)


def _hint(text: str) -> None:
    """Lines for people on stderr, nothing in them that a terminal would obey."""
    click.echo(plain_lines(text), err=True)


def _pipeline_options(command: Command) -> Command:
    for option in (
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."),
        click.option("--pipeline", metavar="FILE", help="A pipeline file."),
        click.option("--scale", metavar="NAME", help="The pipeline of that name: small (the default) or large."),
    ):
        command = option(command)
    return command


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout, nothing else.")(command)


def _choice_options(command: Command) -> Command:
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


def _load(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> Pipeline:
    from builder.config import find_pipeline
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


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, prog_name="builder")
def main() -> None:
    """Image-text tar shards in, hybrid shards out.

    One table, one row a sample. `ingest` reads shards into it, every `stage` adds columns, SQL picks the rows, and
    `write` streams the shards again with the chosen samples swapped.

    \b
    Example:
      builder init mine && cd mine
      builder run --scale small --set dataset.shards="/data/shards/*.tar"
    """


@main.command()
@click.argument("folder", type=_LocalPath(path_type=Path, file_okay=False))
def init(folder: Path) -> None:
    """Copy the SQL and the pipelines for editing.

    They go to FOLDER/sql and FOLDER/pipelines; files that are there already are kept.

    \b
    Example:
      builder init mine
    """
    from builder.store import layout
    from builder.store.files import write_atomic

    for kind in ("sql", "pipelines"):
        for source in sorted(layout.installed(kind).iterdir()):
            target = folder / kind / source.name
            if target.exists():
                _hint(f"kept     {target}")
                continue
            write_atomic(target, source.read_bytes(), durable=False)
            _hint(f"written  {target}")
    _hint(
        f"next: cd {shlex.quote(str(folder))}, "
        "set dataset.shards and dataset.root in pipelines/small.toml, builder plan"
    )


@main.command()
@_pipeline_options
@click.option("--redo", is_flag=True, help="Read every shard again.")
def ingest(scale: str | None, pipeline: str | None, sets: Sequence[str], redo: bool) -> None:
    """Read new and changed shards into the table.

    \b
    Example:
      builder ingest --scale small
    """
    from builder.verbs.ingest import run_ingest

    talk = Talk()
    loaded = _load(scale, pipeline, sets)
    outcome = run_ingest(loaded, talk, redo=redo)
    _tell(loaded, "ingest", outcome, talk)
    _tell_failed(loaded, {"ingest": outcome}, talk)
    sys.exit(_exit_code([outcome]))


@main.command()
@click.argument("name", required=False)
@_pipeline_options
@_choice_options
@click.option("--draw", type=click.Choice(["next"]), help="With another seed than the answer has; with --redo.")
@click.option("--try", "tried", type=click.IntRange(1), metavar="N", help="Only N rows, shown and not committed.")
@click.option("--save", type=_LocalPath(path_type=Path), metavar="DIR", help="With --try: write generated bytes here.")
def stage(
    name: str | None,
    scale: str | None,
    pipeline: str | None,
    sets: Sequence[str],
    retry: str | None,
    redo: bool,
    stale: bool,
    where: str | None,
    draw: str | None,
    tried: int | None,
    save: Path | None,
) -> None:
    """Run one stage over the rows without an answer or out of date.

    NAME is the stage's name in the pipeline: [stages.NAME].

    \b
    Examples:
      builder stage faces --scale large
      builder stage generate --try 20 --save look
      builder stage generate --stale
      builder stage generate --redo --draw next --where "check_faces = 0"
      builder stage prompts --retry failed:timeout --where "shard < '00000010'"
    """
    from builder.engine.workset import Choice
    from builder.verbs.stage import run_stage

    talk = Talk()
    loaded = _load(scale, pipeline, sets)
    if name is None:
        raise ConfigError(
            "builder stage needs the name of a stage",
            where={"file": loaded.config.path, "stages": ", ".join(loaded.stages) or "none"},
            fix=loaded.command(f"stage {next(iter(loaded.stages), 'NAME')}"),
        )
    choice = Choice(retry=retry, redo=redo, stale=stale, where=where, next_draw=draw == "next")
    if save is not None and tried is None:
        raise ConfigError("--save is for --try", fix="builder show SHARD:ROW --save DIR writes what is in the table")
    if tried is not None:
        sys.exit(_try_stage(loaded, name, choice, tried, save))
    outcome = run_stage(loaded, name, choice, talk)
    _tell(loaded, name, outcome, talk)
    _tell_failed(loaded, {name: outcome}, talk)
    sys.exit(_exit_code([outcome]))


def _try_stage(loaded: Pipeline, name: str, choice: Any, count: int, save: Path | None) -> int:
    """What a stage answers for a few rows, how fast, and where that would be too little."""
    from builder.verbs.trial import save_generated, try_stage

    trial = try_stage(loaded, name, choice, count)
    columns = list(dict.fromkeys(column for row in trial.rows for column in row))
    print_table(columns, [[_short(row.get(column)) for column in columns] for row in trial.rows])
    if trial.notice:
        _hint(f"{name}: {trial.notice}")
    for note in trial.notes:
        _hint(f"note: {json.dumps(_as_json(note), ensure_ascii=False)}")
    rows = len(trial.rows)
    click.echo(
        f"\n{rows} rows, {trial.failed} failed; ready in {trial.setup_s:.1f} s, read in {trial.read_s:.2f} s, "
        f"answered in {trial.answer_s:.2f} s: {rows / max(trial.answer_s, 1e-9):,.1f} rows/s for one worker; "
        "nothing is committed",
        err=True,
    )
    if trial.difference is not None:
        click.echo(f"alone and in a batch: difference {trial.difference:g} at most", err=True)
    for path in save_generated(loaded, name, trial, save) if save else []:
        _hint(f"written {path}")
    return EXIT_FAILED_ROWS if trial.failed else EXIT_DONE


def _short(value: Any) -> Any:
    return f"{len(value):,} bytes" if isinstance(value, bytes) else value


@main.command()
@_pipeline_options
def run(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Ingest, run every stage, write.

    What is done is not done again: run it again to go on after a stop.

    \b
    Example:
      builder run --scale small
    """
    from builder.verbs.run import run_all

    talk = Talk()
    loaded = _load(scale, pipeline, sets)
    outcomes = {}
    for name, outcome in run_all(loaded, talk):
        _tell(loaded, name, outcome, talk)
        outcomes[name] = outcome
    _tell_failed(loaded, outcomes, talk)
    if outcomes["write"].counts:
        talk.say(f"hybrid shards: {loaded.layout.shards}; proof: {loaded.command('verify')}")
    sys.exit(_exit_code(outcomes.values()))


@main.command()
@_pipeline_options
def write(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Write the hybrid shards that are not up to date.

    \b
    Example:
      builder write --scale small
    """
    from builder.verbs.write import run_write

    talk = Talk()
    loaded = _load(scale, pipeline, sets)
    outcome = run_write(loaded, talk)
    _tell(loaded, "write", outcome, talk)
    sys.exit(_exit_code([outcome]))


@main.command()
@_pipeline_options
@_choice_options
@_json_option
def plan(
    scale: str | None,
    pipeline: str | None,
    sets: Sequence[str],
    retry: str | None,
    redo: bool,
    stale: bool,
    where: str | None,
    as_json: bool,
) -> None:
    """Show what there is to do; start nothing.

    Counts of the stages and of write are for the shards that the table has already.

    \b
    Example:
      builder plan --scale large --stale
    """
    from builder.engine.workset import Choice
    from builder.hybrid.edited_sample import REASONS
    from builder.verbs.plan import make_plan
    from builder.verbs.write import help_for

    loaded = _load(scale, pipeline, sets)
    choice = Choice(retry=retry, redo=redo, stale=stale, where=where)
    found = make_plan(loaded, choice)
    shards, write_plan = found.ingest, found.write
    commands = [loaded.command(rule.command) for rule in found.older]
    if as_json:
        value = {
            "ingest": {
                "shards": len(shards.found.paths),
                "todo": len(shards.todo),
                "missing": [str(path) for path in shards.missing],
                "vanished": shards.vanished,
            },
            "stages": {name: vars(counts) for name, counts in found.stages.items()},
            "write": {
                "shards": write_plan.shards,
                "todo": len(write_plan.todo),
                "edited": write_plan.edited,
                "dropped": write_plan.dropped,
                "stale": write_plan.stale,
                "refused": write_plan.refused,
                "kept": dict(write_plan.kept),
                "bytes_needed": write_plan.needed,
                "bytes_free": write_plan.free,
            },
            "older": [{**vars(rule), "command": command} for rule, command in zip(found.older, commands, strict=True)],
        }
        click.echo(json.dumps(value))
        return
    print_facts(
        "ingest",
        [("shards that the pipeline names", len(shards.found.paths)), ("new or changed, to read", len(shards.todo))],
        [("named and not there", len(shards.missing)), ("in the table, not named any more", len(shards.vanished))],
    )
    click.echo()
    print_table(
        ("stage", "covered", "ok", "failed", "out of date", "to do", "in shards", "ok, not covered now"),
        [
            (name, c.covered, c.ok, c.failed, c.out_of_date, c.todo, c.shards, c.outside)
            for name, c in found.stages.items()
        ],
    )
    click.echo()
    print_facts(
        "write",
        [
            ("hybrid shards", write_plan.shards),
            ("not up to date, to write", len(write_plan.todo)),
            ("samples edited", write_plan.edited),
            ("samples dropped", write_plan.dropped),
            ("bytes needed", write_plan.needed),
            ("bytes free", write_plan.free),
        ],
        [
            ("of these, image older than its prompt", write_plan.stale),
            ("chosen but bad in the source, left as they are", write_plan.refused),
            *((f"{REASONS[reason]}, left as they are", count) for reason, count in write_plan.kept.items()),
        ],
    )
    for reason in write_plan.kept:
        _hint(f"{REASONS[reason]}: {help_for(loaded, reason)}")
    for rule, command in zip(found.older, commands, strict=True):
        what = "shards were read" if rule.stage == "ingest" else "rows were answered"
        click.echo(f"\n{rule.stage}: {rule.count:,} {what} by version {rule.version}, and stay so until you ask:")
        for change in rule.changes:
            click.echo(f"  now {change}")
        click.echo(f"  {command}")
    if write_plan.needed > write_plan.free:
        click.echo(
            "too little free disk for write: free some space, or name a folder on another disk with [write] folder",
            err=True,
        )
    first = next((name for name, counts in found.stages.items() if counts.todo), None)
    if first is not None and choice != Choice():
        words = f"stage {first}" + " --redo" * redo + " --stale" * stale + (f" --retry {retry}" if retry else "")
        words += f" --where {shlex.quote(where)}" if where else ""
        _hint(f"next: {loaded.command(words)}")
    elif first is not None or shards.todo or write_plan.todo:
        _hint(f"next: {loaded.command('run')}")
    else:
        click.echo("nothing to do", err=True)


@main.command()
@_pipeline_options
@_json_option
def status(scale: str | None, pipeline: str | None, sets: Sequence[str], as_json: bool) -> None:
    """Show what the table holds, and why rows failed.

    Partitions that are behind their column files are brought up to date first.

    \b
    Example:
      builder status --scale small
    """
    from builder.hybrid.edited_sample import REASONS
    from builder.verbs.status import read_status
    from builder.verbs.write import help_for

    loaded = _load(scale, pipeline, sets)
    value = read_status(loaded)
    if as_json:
        click.echo(json.dumps(value))
        return
    click.echo(
        f"{plain(value['root'])}: {value['rows']:,} rows of {value['shards']:,} shards, "
        f"{value['hybrid_shards']:,} hybrid shards, {value['runs']:,} runs\n"
    )
    stages = value["stages"].items()
    print_table(
        ("stage", "ok", "failed", "not tried", "out of date"),
        [(n, s["ok"], s["failed"], s["not_tried"], s["out_of_date"]) for n, s in stages],
    )
    errors = [(n, e["class"], e["rows"], e["example"]) for n, s in stages for e in s["errors"]]
    if errors:
        click.echo()
        print_table(("stage", "failed with", "rows", "for example"), errors)
    if notes := value["notes"]["rows"]:
        question = "select shard, row, source_notes from samples where source_notes is not null"
        click.echo(f"\n{notes:,} rows have notes, for example: {plain(_cut(value['notes']['example'], _CELL))}")
        _hint(f"all of them: {loaded.command(f'sql {shlex.quote(question)}')}")
    if empty := value["no_sample"]:
        more = f" and {len(empty) - _EXAMPLES} more" if len(empty) > _EXAMPLES else ""
        _hint(f"{len(empty)} shards hold no sample: {', '.join(empty[:_EXAMPLES])}{more}")
    for reason, count in value["left_out"].items():
        helps = help_for(loaded, reason)
        click.echo(f"\n{count:,} new images are left out by write, of {REASONS[reason]}\n  {helps}")
    if not value["shards"]:
        _hint(f"the table is empty; next: {loaded.command('ingest')}")


@main.command()
@click.argument("question")
@_pipeline_options
@_json_option
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values on stdout.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A value for $NAME; repeatable.")
def sql(
    question: str,
    scale: str | None,
    pipeline: str | None,
    sets: Sequence[str],
    as_json: bool,
    as_csv: bool,
    params: Sequence[str],
) -> None:
    """Answer a SELECT over the table `samples`.

    QUESTION is the SQL, or a file of it that ends in .sql. Columns are in docs/columns.md, or: describe samples. Long
    values are cut in the printed table; --json and --csv give all of them.

    \b
    Examples:
      builder sql "select lang, count(*) from samples where face_count > 0 group by 1"
      builder sql sql/stats.sql --scale small
      builder sql "select uid, caption from samples where lang = \\$lang" --param lang=fr --csv
    """
    from builder.table.query import Sql, read_sql
    from builder.verbs.fold import behind
    from builder.verbs.sql import answer

    loaded = _load(scale, pipeline, sets)
    text = read_sql(question) if question.endswith(".sql") else Sql(question, "the command line")
    names, rows = answer(loaded, text, _params(params))
    if as_json:
        click.echo(json.dumps([dict(zip(names, map(_as_json, row), strict=True)) for row in rows]))
        return
    if as_csv:
        import csv

        out = csv.writer(sys.stdout, lineterminator="\n")
        shown = plain if sys.stdout.isatty() else str
        out.writerow(map(shown, names))
        out.writerows([v if v is None or _is_number(v) else shown(_text(v)) for v in row] for row in rows)
        return
    print_table(names, rows)
    if not rows:
        click.echo("no rows", err=True)
    if late := behind(loaded.layout):
        brought = f"{loaded.command('status')} brings them up to date"
        _hint(f"{late} partitions are behind their column files: {brought}")


def _params(items: Sequence[str]) -> dict[str, Any]:
    import tomllib

    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--param takes NAME=VALUE, not '{item}'", fix="for example: --param lang=en")
        try:
            values[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = text
    return values


@main.command()
@click.argument("uid")
@_pipeline_options
@_json_option
@click.option(
    "--save", type=_LocalPath(path_type=Path), metavar="DIR", help="Also write the sample's image and its new image."
)
def show(
    uid: str, scale: str | None, pipeline: str | None, sets: Sequence[str], as_json: bool, save: Path | None
) -> None:
    """Show everything about one sample.

    UID is its uid, or SHARD:ROW. Columns without a value are left out; --json has them all.

    \b
    Example:
      builder show 00000000:3 --save /tmp/sample
    """
    from builder.verbs.show import find_samples, save_images

    loaded = _load(scale, pipeline, sets)
    rows = find_samples(loaded, uid)
    saved = save_images(loaded, rows, save) if save is not None else []
    if as_json:
        click.echo(json.dumps([_as_json(row) for row in rows]))
        return
    columns: dict[str, list[str]] = {}
    for column in loaded.columns():
        columns.setdefault(column.stage, []).append(column.name)
    for row in rows:
        _show_sample(row, columns)
    for path in saved:
        _hint(f"written {path}")


def _show_sample(row: dict[str, Any], columns: dict[str, list[str]]) -> None:
    click.echo(f"sample {plain(str(row['uid']))}: shard {plain(str(row['shard']))} row {row['row']}")
    for stage, names in columns.items():
        click.echo(f"\n{stage}: {row[f'{stage}_status'] or 'not tried'}")
        for name in names:
            if row[name] is not None and name != f"{stage}_status":
                click.echo(f"  {plain(name):<20} {plain(_cut(_text(row[name]), _VALUE))}".rstrip())


@main.command()
@click.argument("uid")
@_pipeline_options
@_json_option
@click.option("--check", is_flag=True, help="Compare it with the stored one; exit 3 if they differ.")
@click.option("--out", type=_LocalPath(path_type=Path), metavar="FILE", help="Write it to this file.")
@click.option("--device", metavar="NAME", help="What to make it on: cpu, cuda:0; the stage's first device if absent.")
def regen(
    uid: str,
    scale: str | None,
    pipeline: str | None,
    sets: Sequence[str],
    as_json: bool,
    check: bool,
    out: Path | None,
    device: str | None,
) -> None:
    """Make one generated image again, from the table alone.

    UID is the sample's uid, or SHARD:ROW. On the same device, with the same packages and batch size, it is the same
    bit for bit; where it is not, what differs is told.

    \b
    Example:
      builder regen 00000000:3 --check --scale large
    """
    from builder.store.files import write_atomic
    from builder.verbs.regen import regenerate

    if not check and out is None:
        raise ConfigError(
            "builder regen needs --check, --out FILE, or both", fix=f"builder regen {shlex.quote(uid)} --check"
        )
    again = regenerate(_load(scale, pipeline, sets), uid, device=device)
    if out is not None:
        write_atomic(out, again.made, durable=False)
    if as_json:
        told = {name: value for name, value in vars(again).items() if name not in ("stored", "made")}
        click.echo(json.dumps({**told, "same": again.is_same}))
    else:
        click.echo(f"sample {plain(again.uid)}: shard {plain(again.shard)} row {again.row}")
        _show_regen(again)
        if out is not None:
            _hint(f"written {out}")
    sys.exit(EXIT_FAILED_ROWS if check and not again.is_same else EXIT_DONE)


def _show_regen(again: Any) -> None:
    if again.is_same:
        click.echo("the same image, bit for bit")
        return
    if again.stored is None:
        click.echo("the stored image is gone")
    elif again.mean is None:
        click.echo("another image: its pixels cannot be compared")
    else:
        click.echo(f"another image: pixels differ by {again.mean:.3g} of 255 on average, {again.most} at most")
    for reason in again.reasons or ["nothing is known to differ: the model's files, the driver, or the machine do"]:
        click.echo(f"  {plain(reason)}")


@main.command()
@_pipeline_options
@_json_option
def verify(scale: str | None, pipeline: str | None, sets: Sequence[str], as_json: bool) -> None:
    """Prove the hybrid shards against their sources.

    Exactly the selected samples differ; every other byte is the source's.

    \b
    Example:
      builder verify --scale small
    """
    from builder.hybrid.verify import summary
    from builder.verbs.verify import prove

    loaded = _load(scale, pipeline, sets)
    proof = prove(loaded, Talk(quiet=as_json))
    if proof.shards == 0:
        raise ConfigError(
            "there is nothing to verify: the table has none of the pipeline's shards",
            where={"root": loaded.layout.root},
            fix=loaded.command("run"),
        )
    if as_json:
        click.echo(json.dumps(vars(proof)))
    else:
        print_facts("verify", summary(proof))
        for problem in proof.problems:
            _hint(f"wrong: {plain(problem)}")
        if options := _options_of(loaded, proof.problems):
            _hint(options)
        for shard in proof.unread:
            _hint(f"not proven, not read: {shard}")
    if proof.unread and not proof.problems:
        sys.exit(EXIT_UNFINISHED)
    sys.exit(EXIT_FAILED_ROWS if proof.problems else EXIT_DONE)


@main.command()
@_pipeline_options
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
def gc(scale: str | None, pipeline: str | None, sets: Sequence[str], dry_run: bool) -> None:
    """Delete what nothing needs any more.

    Old generations of column files, temp files of dead processes, edits tars and runs that no row points to. Nothing
    else ever deletes.

    \b
    Example:
      builder gc --scale small --dry-run
    """
    from builder.verbs.gc import collect_garbage

    sweep = collect_garbage(_load(scale, pipeline, sets), Talk(), dry_run=dry_run)
    for path in sweep.paths:
        click.echo(plain(str(path)))
    click.echo(
        f"{'would delete' if dry_run else 'deleted'} {len(sweep.paths)} files and folders, {sweep.size:,} bytes",
        err=True,
    )


@main.command()
@_pipeline_options
def fold(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Bring every partition up to date for other tools.

    Afterwards each has all of the root's columns, and what its newest column files hold.

    \b
    Example:
      builder fold --scale small
    """
    from builder.verbs.fold import fold_all

    folded = fold_all(_load(scale, pipeline, sets), Talk())
    click.echo(f"{folded} partitions folded", err=True)


@main.command()
@click.argument("column")
@_pipeline_options
def drop(column: str, scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Take a stage's column out of the table.

    COLUMN is an output of a stage. Its column files keep it: a pipeline that still has the stage brings it back with
    its next run.

    \b
    Example:
      builder drop lang_score --scale small
    """
    from builder.verbs.drop import drop_column

    loaded = _load(scale, pipeline, sets)
    drop_column(loaded, column)
    _hint(f"column '{column}' is dropped; {loaded.command('fold')} takes it out of the partitions")
    owner = next((name for name, use in loaded.stages.items() if column in _outputs(use.stage)), None)
    if owner is not None:
        click.echo(f"stage '{owner}' of this pipeline has it: its next run brings it back", err=True)


def _outputs(stage: Any) -> list[str]:
    from builder.stages.contract import columns_of

    return [column.name for column in columns_of(stage)]


@main.command()
@click.option(
    "--out",
    type=_LocalPath(path_type=Path),
    metavar="DIR",
    default=Path("demo"),
    show_default=True,
    help="The demo's folder.",
)
@click.option("--workers", type=click.IntRange(1), metavar="N", default=2, show_default=True, help="Worker processes.")
def demo(out: Path, workers: int) -> None:
    """Do the whole way on 200 real photos.

    Makes two small shards, runs everything over them, proves the result, and leaves all of it to look at.

    \b
    Example:
      builder demo --out demo
    """
    from builder.demo.run import run_demo

    sys.exit(EXIT_DONE if run_demo(out, Talk(), workers=workers) else EXIT_FAILED_ROWS)


@main.command("help", hidden=True)
@click.argument("command", required=False)
@click.pass_context
def help_(context: click.Context, command: str | None) -> None:
    """Show what a command does; without one, all of them.

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


@main.command(hidden=True)
@click.argument("run_folder", type=_LocalPath(path_type=Path))
@click.argument("number", type=int)
def task(run_folder: Path, number: int) -> None:
    """Do task NUMBER of the run directory RUN_FOLDER; what executors start."""
    from builder.engine.runs import run_task

    sys.exit(run_task(run_folder, number))


# --- what people read ---


def _tell(loaded: Pipeline, name: str, outcome: Outcome, talk: Talk) -> None:
    """One line on what a command did, and one a refused shard."""
    if outcome.counts:
        shown = ("shards", "rows", "changed", "ok", "failed", "kept", "dropped", "edited")
        words = _WORDS if name != "write" else {}
        counts = ", ".join(f"{outcome[key]} {words.get(key, key)}" for key in shown if outcome[key])
        talk.say(f"{name}: {counts or 'nothing'} in {outcome.seconds:.1f} s")
    if outcome["kept"]:
        talk.say(f"  why: cat {shlex.quote(str(outcome.folder))}/logs/*.failures.jsonl")
    for shard, reason in outcome.refused.items():
        talk.say(f"refused shard '{plain(shard)}': {reason}")
    if outcome["of_macos"]:
        talk.say(
            f"{outcome['of_macos']} members that macOS puts beside files (._NAME, .DS_Store, __MACOSX/) belong to no "
            "sample; write copies them as they are"
        )
    told = [(shard, text) for shard in sorted(outcome.remarks) for text in outcome.remarks[shard]]
    for shard, text in told[:_REMARKS]:
        talk.say(f"shard '{plain(shard)}': {text}")
    if len(told) > _REMARKS:
        talk.say(
            f"and {len(told) - _REMARKS} more of these lines: 'remarks' in "
            f"{shlex.quote(str(outcome.folder))}/tasks/*.result.json"
        )
    for shard, reason in outcome.left.items():
        talk.say(f"left shard '{plain(shard)}' as it is: {reason}")
    if outcome.unfinished is not None:
        talk.say(f"{name}: not finished: {outcome.unfinished}")
    if options := _options_of(loaded, [*outcome.refused.values(), *outcome.left.values(), str(outcome.unfinished)]):
        talk.say(options)


_WORDS = {"kept": "failed again, their old answer stays", "dropped": "answered by another run or left out"}


def _tell_failed(loaded: Pipeline, outcomes: dict[str, Outcome], talk: Talk) -> None:
    """Where to look after rows have failed, and how to try them again where that may help."""
    from builder.verbs.stage import is_lasting

    for name, outcome in outcomes.items():
        if outcome["failed"]:
            talk.say(f"{name}: {outcome['failed']} failed\n  why: {loaded.command('status')}")
            if name != "ingest" and is_lasting(loaded, name, outcome):
                talk.say("  another try would give the same: they need other inputs or options")
            elif name != "ingest":
                retry = loaded.command(f"stage {name} --retry failed")
                talk.say(f"  to try them again: {retry}")


def _exit_code(outcomes: Iterable[Outcome]) -> int:
    done = list(outcomes)
    if any(outcome.left or outcome.unfinished for outcome in done):
        return EXIT_UNFINISHED
    return EXIT_DONE if all(outcome.is_clean for outcome in done) else EXIT_FAILED_ROWS


def print_table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout: as wide as its values, nothing in it that a terminal would obey, no blanks at line ends."""
    from rich.cells import cell_len

    values = [list(row) for row in rows]
    filled = [[row[i] for row in values if row[i] is not None] for i in range(len(names))]
    numbers = [bool(cells) and all(map(_is_number, cells)) for cells in filled]
    lines = [[plain(_cut(_text(cell), _CELL)) for cell in row] for row in [list(names), *values]]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = []
        for cell, width, is_number in zip(line, widths, numbers, strict=True):
            blanks = " " * (width - cell_len(cell))
            cells.append(blanks + cell if is_number else cell + blanks)
        click.echo("  ".join(cells).rstrip())


def print_facts(title: str, facts: Sequence[tuple[str, Any]], if_any: Sequence[tuple[str, int]] = ()) -> None:
    """Names and values on stdout, one a line; those of `if_any` only if they are not 0."""
    facts = [*facts, *((name, value) for name, value in if_any if value)]
    width = max(len(name) for name, _ in facts)
    click.echo(title)
    for name, value in facts:
        click.echo(f"  {name:<{width}}  {f'{value:,}' if isinstance(value, int) else plain(str(value))}")


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float | Decimal) and not isinstance(cell, bool)


def _text(value: Any) -> str:
    """A value of the table as people read it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return min(str(value), f"{value:.6g}", key=len)
    if isinstance(value, list | dict):
        return json.dumps(_as_json(value), ensure_ascii=False)
    return str(value)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _as_json(value: Any) -> Any:
    """A value of the table as json can hold it: what json has no word for becomes null, bytes hex, else text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return float(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value.hex() if isinstance(value, bytes) else str(value)
