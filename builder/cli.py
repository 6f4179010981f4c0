"""The command line: parse, call, print. Data to stdout, talk to stderr.

Heavy modules are imported inside the commands, so that `--help` starts at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from builder import __version__
from builder.errors import BuilderError, ConfigError, SchemaError
from builder.progress import Talk, plain

if TYPE_CHECKING:
    from builder.pipeline import Pipeline
    from builder.runs import Outcome

EXIT_DONE, EXIT_UNFINISHED, EXIT_USAGE, EXIT_FAILED_ROWS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
_EXIT_CODES = (
    "Exit codes: 0 done; 1 it did not finish; 2 usage or a bad pipeline file; 3 done, but this command's own work left "
    "failed rows or refused shards; 130 interrupted."
)
#: Cells of a printed table are cut at this length.
_CELL = 100

Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Commands in the order of their work, and errors of the package as messages."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BuilderError as error:
            _fail(context, error)
        except KeyboardInterrupt:
            click.echo("\nstopped: everything committed is kept; run the same command again to go on", err=True)
            sys.exit(EXIT_INTERRUPTED)


def _fail(context: click.Context, error: BuilderError) -> NoReturn:
    if "--json" in sys.argv:
        place = {name: str(value) for name, value in error.where.items()}
        told = {"class": type(error).__name__, "what": error.what, "where": place, "fix": error.fix}
        click.echo(json.dumps({"error": told}))
    else:
        click.echo("\n".join(plain(line) for line in f"error: {error}".splitlines()), err=True)
    sys.exit(EXIT_USAGE if isinstance(error, ConfigError | SchemaError) else EXIT_UNFINISHED)


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
        click.option("--retry", metavar="CLASS", help="Failed rows, too: 'failed' for all, or a class of error."),
    ):
        command = option(command)
    return command


def _load(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> Pipeline:
    from builder import pipeline as pipelines
    from builder.config import find_pipeline

    if scale and pipeline:
        raise ConfigError("--scale and --pipeline both name a pipeline", fix="give one of them")
    return pipelines.load(find_pipeline(scale, pipeline), sets)


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
@click.argument("folder", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """Copy the SQL and the pipelines into FOLDER for editing.

    \b
    Example:
      builder init mine
    """
    from builder import layout
    from builder.files import write_atomic

    for kind in ("sql", "pipelines"):
        for source in sorted(layout.installed(kind).iterdir()):
            target = folder / kind / source.name
            if target.exists():
                click.echo(f"kept     {target}", err=True)
                continue
            write_atomic(target, source.read_bytes(), durable=False)
            click.echo(f"written  {target}", err=True)
    click.echo(f"next: cd {folder}, set dataset.shards in pipelines/small.toml, builder plan", err=True)


@main.command()
@_pipeline_options
@click.option("--redo", is_flag=True, help="Read every shard again.")
def ingest(scale: str | None, pipeline: str | None, sets: Sequence[str], redo: bool) -> None:
    """Read new and changed shards into the table.

    \b
    Example:
      builder ingest --scale small
    """
    from builder import pipeline as pipelines

    talk = Talk()
    outcome = pipelines.ingest(_load(scale, pipeline, sets), talk, redo=redo)
    _tell("ingest", outcome, talk)
    sys.exit(_exit_code([outcome]))


@main.command()
@click.argument("name")
@_pipeline_options
@_choice_options
def stage(
    name: str,
    scale: str | None,
    pipeline: str | None,
    sets: Sequence[str],
    retry: str | None,
    redo: bool,
    stale: bool,
    where: str | None,
) -> None:
    """Run one stage over the rows that have no answer yet.

    \b
    Examples:
      builder stage faces --scale large
      builder stage generate --stale
      builder stage faces --retry failed --where "shard < '00000010'"
    """
    from builder import pipeline as pipelines
    from builder.workset import Choice

    talk = Talk()
    choice = Choice(retry=retry, redo=redo, stale=stale, where=where)
    outcome = pipelines.run_stage(_load(scale, pipeline, sets), name, choice, talk)
    _tell(name, outcome, talk)
    sys.exit(_exit_code([outcome]))


@main.command()
@_pipeline_options
def run(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Ingest, run every stage, write. Run it again to go on after a stop.

    \b
    Example:
      builder run --scale small
    """
    from builder import pipeline as pipelines

    talk = Talk()
    loaded = _load(scale, pipeline, sets)
    outcomes = []
    for name, outcome in pipelines.run(loaded, talk):
        _tell(name, outcome, talk)
        outcomes.append(outcome)
    sys.exit(_exit_code(outcomes))


@main.command()
@_pipeline_options
def write(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Write the hybrid shards that are not up to date.

    \b
    Example:
      builder write --scale small
    """
    from builder import pipeline as pipelines

    talk = Talk()
    outcome = pipelines.write(_load(scale, pipeline, sets), talk)
    _tell("write", outcome, talk)
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

    \b
    Example:
      builder plan --scale large --stale
    """
    from builder import pipeline as pipelines
    from builder.workset import Choice

    choice = Choice(retry=retry, redo=redo, stale=stale, where=where)
    found = pipelines.plan(_load(scale, pipeline, sets), choice)
    ingest_plan, write_plan = found.ingest, found.write
    value = {
        "ingest": {
            "shards": len(ingest_plan.found.paths),
            "todo": len(ingest_plan.todo),
            "missing": [str(path) for path in ingest_plan.missing],
            "vanished": ingest_plan.vanished,
        },
        "stages": {name: vars(counts) for name, counts in found.stages.items()},
        "write": {
            "shards": write_plan.shards,
            "todo": len(write_plan.todo),
            "edited": write_plan.edited,
            "dropped": write_plan.dropped,
            "stale": write_plan.stale,
            "refused": write_plan.refused,
            "bytes_needed": write_plan.needed,
            "bytes_free": write_plan.free,
        },
    }
    if as_json:
        click.echo(json.dumps(value))
        return
    print_table(
        ("ingest", "shards", "to read", "missing", "vanished"),
        [
            (
                "",
                len(ingest_plan.found.paths),
                len(ingest_plan.todo),
                len(ingest_plan.missing),
                len(ingest_plan.vanished),
            )
        ],
    )
    print_table(
        ("stage", "covered", "ok", "failed", "to do", "shards", "answered, not covered"),
        [(name, c.covered, c.ok, c.failed, c.todo, c.shards, c.outside) for name, c in found.stages.items()],
    )
    print_table(
        ("write", "shards", "to write", "edited", "dropped", "image older than prompt", "bytes needed", "bytes free"),
        [("", write_plan.shards, len(write_plan.todo), write_plan.edited, write_plan.dropped, write_plan.stale,
          f"{write_plan.needed:,}", f"{write_plan.free:,}")],
    )  # fmt: skip
    if write_plan.needed > write_plan.free:
        click.echo("too little free disk for write: free some space, or set dataset.root to another disk", err=True)
    if ingest_plan.todo:
        click.echo("counts of stages and write are for the shards that the table has already", err=True)


@main.command()
@_pipeline_options
@_json_option
def status(scale: str | None, pipeline: str | None, sets: Sequence[str], as_json: bool) -> None:
    """Show what the table holds: rows, answers and failures of every stage.

    \b
    Example:
      builder status --scale small
    """
    from builder import pipeline as pipelines

    value = pipelines.status(_load(scale, pipeline, sets))
    if as_json:
        click.echo(json.dumps(value))
        return
    click.echo(
        f"root {value['root']}: {value['shards']} shards, {value['rows']} rows, {value['hybrid_shards']} hybrid "
        f"shards, {value['runs']} runs"
    )
    stages = value["stages"].items()
    print_table(("stage", "ok", "failed", "not tried"), [(n, s["ok"], s["failed"], s["not_tried"]) for n, s in stages])
    errors = [(n, e["class"], e["rows"], e["example"]) for n, s in stages for e in s["errors"]]
    if errors:
        print_table(("stage", "failed with", "rows", "for example"), errors)


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
    """Answer a SELECT over the table `samples`; QUESTION is the SQL or a file of it.

    \b
    Examples:
      builder sql "select lang, count(*) from samples where face_count > 0 group by 1"
      builder sql sql/stats.sql --scale small
    """
    from builder import pipeline as pipelines
    from builder.query import Sql, read_sql

    loaded = _load(scale, pipeline, sets)
    text = read_sql(question) if question.endswith(".sql") else Sql(question, "the command line")
    names, rows = pipelines.answer(loaded, text, _params(params))
    if as_json:
        click.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], default=str))
        return
    if as_csv:
        import csv

        out = csv.writer(sys.stdout)
        out.writerow(names)
        out.writerows(rows)
        return
    print_table(names, rows)
    if late := pipelines.behind(loaded.layout):
        click.echo(f"{late} partitions are behind their column files: builder status brings them up to date", err=True)


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
@click.option("--save", type=click.Path(path_type=Path), help="Also write the sample's image and its new image here.")
def show(
    uid: str, scale: str | None, pipeline: str | None, sets: Sequence[str], as_json: bool, save: Path | None
) -> None:
    """Show everything about one sample; UID is its uid, or SHARD:ROW.

    \b
    Example:
      builder show 00000000:3 --save /tmp/sample
    """
    from builder import pipeline as pipelines

    loaded = _load(scale, pipeline, sets)
    rows = pipelines.show(loaded, uid)
    if save is not None:
        for path in pipelines.save_images(loaded, rows, save):
            click.echo(f"written {path}", err=True)
    if as_json:
        click.echo(json.dumps(rows, default=str))
        return
    for row in rows:
        click.echo(f"uid {plain(str(row['uid']))}: shard {plain(str(row['shard']))} row {row['row']}")
        print_table(("column", "value"), [(name, _shown(value)) for name, value in row.items()], limit=1000)


def _shown(value: Any) -> str:
    return (
        "null"
        if value is None
        else json.dumps(value, default=str, ensure_ascii=False)
        if isinstance(value, list)
        else str(value)
    )


@main.command()
@_pipeline_options
@_json_option
def verify(scale: str | None, pipeline: str | None, sets: Sequence[str], as_json: bool) -> None:
    """Prove that exactly the selected samples of the hybrid shards differ from the source.

    \b
    Example:
      builder verify --scale small
    """
    from builder import pipeline as pipelines
    from builder.verify import summary

    proof = pipelines.prove(_load(scale, pipeline, sets), Talk(quiet=as_json))
    if as_json:
        click.echo(json.dumps(vars(proof)))
    else:
        print_table(("verify", ""), summary(proof))
        for problem in proof.problems:
            click.echo(f"wrong: {plain(problem)}", err=True)
    sys.exit(EXIT_FAILED_ROWS if proof.problems else EXIT_DONE)


@main.command()
@_pipeline_options
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
def gc(scale: str | None, pipeline: str | None, sets: Sequence[str], dry_run: bool) -> None:
    """Delete what nothing needs: old generations, dead temp files, unreferenced edits tars and runs.

    \b
    Example:
      builder gc --scale small --dry-run
    """
    from builder import pipeline as pipelines

    sweep = pipelines.gc(_load(scale, pipeline, sets), Talk(), dry_run=dry_run)
    for path in sweep.paths:
        click.echo(path)
    click.echo(
        f"{'would delete' if dry_run else 'deleted'} {len(sweep.paths)} files and folders, {sweep.size:,} bytes",
        err=True,
    )


@main.command()
@_pipeline_options
def fold(scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Bring every partition up to date with its column files and the root's columns.

    \b
    Example:
      builder fold --scale small
    """
    from builder import pipeline as pipelines

    folded = pipelines.fold_all(_load(scale, pipeline, sets), Talk())
    click.echo(f"{folded} partitions folded", err=True)


@main.command()
@click.argument("column")
@_pipeline_options
def drop(column: str, scale: str | None, pipeline: str | None, sets: Sequence[str]) -> None:
    """Take an output of a stage out of the table.

    \b
    Example:
      builder drop lang_score --scale small
    """
    from builder import pipeline as pipelines

    pipelines.drop(_load(scale, pipeline, sets), column)
    click.echo(f"column '{column}' is dropped; builder fold takes it out of the partitions", err=True)


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="The demo's folder."
)
@click.option("--workers", type=int, default=2, show_default=True, help="Worker processes.")
def demo(out: Path, workers: int) -> None:
    """Do the whole way on 200 samples of real photos, and leave everything to look at.

    \b
    Example:
      builder demo --out demo
    """
    from builder.demo import run_demo

    sys.exit(EXIT_DONE if run_demo(out, Talk(), workers=workers) else EXIT_FAILED_ROWS)


@main.command(hidden=True)
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.argument("number", type=int)
def task(run_folder: Path, number: int) -> None:
    """Do task NUMBER of the run directory RUN_FOLDER; what executors start."""
    from builder.runs import run_task

    sys.exit(run_task(run_folder, number))


def _tell(name: str, outcome: Outcome, talk: Talk) -> None:
    """One line on what a command did, and one a refused shard."""
    if outcome.counts:
        shown = ("shards", "rows", "ok", "failed", "kept", "dropped", "edited")
        counts = ", ".join(f"{outcome[key]} {_WORDS.get(key, key)}" for key in shown if outcome[key])
        talk.say(f"{name}: {counts or 'nothing'} in {outcome.seconds:.1f} s")
    for shard, reason in outcome.refused.items():
        talk.say(f"refused shard '{plain(shard)}': " + "\n".join(plain(line) for line in reason.splitlines()))


_WORDS = {"kept": "failed again, their old answer stays", "dropped": "answered by another run or left out"}


def _exit_code(outcomes: Iterable[Outcome]) -> int:
    return EXIT_DONE if all(outcome.is_clean for outcome in outcomes) else EXIT_FAILED_ROWS


def print_table(names: Sequence[str], rows: Iterable[Sequence[Any]], limit: int = _CELL) -> None:
    """A table on stdout: as wide as its values, nothing in it that a terminal would obey."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(names):
        is_number = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        shown.add_column(Text(plain(name)), justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        cells = ["null" if cell is None else plain(str(cell)) for cell in row]
        shown.add_row(*(Text(cell if len(cell) <= limit else cell[: limit - 3] + "...") for cell in cells))
    Console(width=4000 if rows else 200, soft_wrap=True, highlight=False, file=sys.stdout).print(shown)
