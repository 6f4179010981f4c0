"""Commands that only read: plan, status, sql, show."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.cli.options import LocalPath, PipelineOptions, choice_options, choice_words, json_option, pipeline_options
from builder.cli.output import CELL_WIDTH, VALUE_WIDTH, hint, is_number, json_of, print_facts, print_table, text_of
from builder.errors import ConfigError
from builder.progress import few, plain, shortened

if TYPE_CHECKING:
    from builder.verbs.pipeline import Pipeline
    from builder.verbs.plan import Plan


@click.command()
@pipeline_options
@choice_options
@json_option
def plan(named: PipelineOptions, choice: dict[str, Any], as_json: bool) -> None:
    """Show what there is to do; start nothing.

    Counts of the stages and of write are for the shards that are in the table already.

    \b
    Example:
      builder plan --scale large --stale
    """
    from builder.engine.work import Choice
    from builder.hybrid.edit import REASONS
    from builder.verbs.plan import make_plan
    from builder.verbs.snapshot import Snapshot
    from builder.verbs.write import help_for

    loaded = named.load()
    asked = Choice(**choice)
    found = make_plan(loaded, asked)
    if as_json:
        click.echo(json.dumps(_plan_as_json(loaded, found)))
        return
    _show_plan(found)
    for reason in found.write.kept:
        hint(f"{REASONS[reason]}: {help_for(Snapshot(loaded), reason)}")
    for rule in found.older:
        what = "shards were read" if rule.stage == "ingest" else "rows were answered"
        click.echo(f"\n{rule.stage}: {rule.count:,} {what} by version {rule.version}, and stay so until you ask:")
        for change in rule.changes:
            click.echo(f"  now {change}")
        click.echo(f"  {loaded.command(rule.command)}")
    if found.write.needed > found.write.free:
        click.echo(
            "too little free disk for write: free some space, or name a folder on another disk with [write] folder",
            err=True,
        )
    first = next((name for name, counts in found.stages.items() if counts.todo), None)
    if first is not None and asked != Choice():
        hint(f"next: {loaded.command(shlex.join(['stage', first, *choice_words(choice)]))}")
    elif first is not None or found.ingest.todo or found.write.todo:
        hint(f"next: {loaded.command('run')}")
    else:
        click.echo("nothing to do", err=True)


def _plan_as_json(loaded: Pipeline, found: Plan) -> dict[str, Any]:
    shards, write = found.ingest, found.write
    return {
        "ingest": {
            "shards": len(shards.found.paths),
            "todo": len(shards.todo),
            "missing": [str(path) for path in shards.missing],
            "vanished": shards.vanished,
        },
        "stages": {name: vars(counts) for name, counts in found.stages.items()},
        "write": {
            "shards": write.shards,
            "todo": len(write.todo),
            "edited": write.edited,
            "dropped": write.dropped,
            "stale": write.stale,
            "refused": write.refused,
            "kept": dict(write.kept),
            "bytes_needed": write.needed,
            "bytes_free": write.free,
        },
        "older": [{**vars(rule), "command": loaded.command(rule.command)} for rule in found.older],
    }


def _show_plan(found: Plan) -> None:
    """Prints what there is to ingest, for each stage, and to write."""
    from builder.hybrid.edit import REASONS

    shards, write = found.ingest, found.write
    print_facts(
        "ingest",
        [("shards that the pipeline names", len(shards.found.paths)), ("new or changed, to read", len(shards.todo))],
        [("named and not there", len(shards.missing)), ("in the table, no longer named", len(shards.vanished))],
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
            ("hybrid shards", write.shards),
            ("not up to date, to write", len(write.todo)),
            ("samples edited", write.edited),
            ("samples dropped", write.dropped),
            ("bytes needed", write.needed),
            ("bytes free", write.free),
        ],
        [
            ("of these, image older than its prompt", write.stale),
            ("chosen but bad in the source, left as they are", write.refused),
            *((f"{REASONS[reason]}, left as they are", count) for reason, count in write.kept.items()),
        ],
    )


@click.command()
@pipeline_options
@json_option
def status(named: PipelineOptions, as_json: bool) -> None:
    """Show what the table holds, and why rows failed.

    Partitions that are behind their column files are brought up to date first.

    \b
    Example:
      builder status --scale small
    """
    from builder.hybrid.edit import REASONS
    from builder.verbs.snapshot import Snapshot
    from builder.verbs.status import read_status
    from builder.verbs.write import help_for

    loaded = named.load()
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
        example = plain(shortened(value["notes"]["example"], CELL_WIDTH))
        click.echo(f"\n{notes:,} rows have notes, for example: {example}")
        hint(f"all of them: {loaded.command(f'sql {shlex.quote(question)}')}")
    if empty := value["no_sample"]:
        hint(f"{len(empty)} shards hold no sample: {few(empty)}")
    for reason, count in value["left_out"].items():
        helps = help_for(Snapshot(loaded), reason)
        click.echo(f"\n{count:,} new images are left out by write, of {REASONS[reason]}\n  {helps}")
    if not value["shards"]:
        hint(f"the table is empty; next: {loaded.command('ingest')}")


@click.command()
@click.argument("question")
@pipeline_options
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values on stdout.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A value for $NAME; repeatable.")
def sql(
    question: str,
    named: PipelineOptions,
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
    from builder.table.sql_text import Sql, read_sql
    from builder.verbs.fold import behind
    from builder.verbs.sql import answer

    loaded = named.load()
    text = read_sql(question) if question.endswith(".sql") else Sql(question, "the command line")
    names, rows = answer(loaded, text, _params(params))
    if as_json:
        click.echo(json.dumps([dict(zip(names, map(json_of, row), strict=True)) for row in rows]))
        return
    if as_csv:
        import csv

        out = csv.writer(sys.stdout, lineterminator="\n")
        shown = plain if sys.stdout.isatty() else str
        out.writerow(map(shown, names))
        out.writerows([v if v is None or is_number(v) else shown(text_of(v)) for v in row] for row in rows)
        return
    print_table(names, rows)
    if not rows:
        click.echo("no rows", err=True)
    if late := behind(loaded.layout):
        brought = f"{loaded.command('status')} brings them up to date"
        hint(f"{late} partitions are behind their column files: {brought}")


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


@click.command()
@click.argument("uid")
@pipeline_options
@json_option
@click.option(
    "--save", type=LocalPath(path_type=Path), metavar="DIR", help="Also write the sample's image and its new image."
)
def show(named: PipelineOptions, uid: str, as_json: bool, save: Path | None) -> None:
    """Show everything about one sample.

    UID is its uid, or SHARD:ROW. Columns without a value are left out; --json has them all.

    \b
    Example:
      builder show 00000000:3 --save /tmp/sample
    """
    from builder.verbs.show import find_samples, save_images
    from builder.verbs.snapshot import Snapshot

    loaded = named.load()
    rows = find_samples(loaded, uid)
    saved = save_images(loaded, rows, save) if save is not None else []
    if as_json:
        click.echo(json.dumps([json_of(row) for row in rows]))
        return
    columns: dict[str, list[str]] = {}
    for column in Snapshot(loaded).columns:
        columns.setdefault(column.stage, []).append(column.name)
    for row in rows:
        _show_sample(row, columns)
    for path in saved:
        hint(f"written {path}")


def _show_sample(row: dict[str, Any], columns: dict[str, list[str]]) -> None:
    click.echo(f"sample {plain(str(row['uid']))}: shard {plain(str(row['shard']))} row {row['row']}")
    for stage, names in columns.items():
        click.echo(f"\n{stage}: {row[f'{stage}_status'] or 'not tried'}")
        for name in names:
            if row[name] is not None and name != f"{stage}_status":
                click.echo(f"  {plain(name):<20} {plain(shortened(text_of(row[name]), VALUE_WIDTH))}".rstrip())
