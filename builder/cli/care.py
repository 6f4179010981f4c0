"""Commands that look after a root: gc, fold, drop."""

from __future__ import annotations

from typing import Any

import click

from builder.cli.options import PipelineOptions, pipeline_options
from builder.cli.output import hint
from builder.progress import Talk, plain


@click.command()
@pipeline_options
@click.option("--dry-run", is_flag=True, help="Only report what would be deleted.")
def gc(named: PipelineOptions, dry_run: bool) -> None:
    """Delete files that are no longer needed.

    Old generations of column files, temp files of dead processes, edits tars and runs that no row points to. No
    other command deletes such files.

    \b
    Example:
      builder gc --scale small --dry-run
    """
    from builder.verbs.gc import collect_garbage

    sweep = collect_garbage(named.load(), Talk(), dry_run=dry_run)
    for path in sweep.paths:
        click.echo(plain(str(path)))
    click.echo(
        f"{'would delete' if dry_run else 'deleted'} {len(sweep.paths)} files and folders, {sweep.size:,} bytes",
        err=True,
    )


@click.command()
@pipeline_options
def fold(named: PipelineOptions) -> None:
    """Bring every partition up to date for other tools.

    Afterwards each has all of the root's columns, and what its newest column files hold.

    \b
    Example:
      builder fold --scale small
    """
    from builder.verbs.fold import fold_all

    folded = fold_all(named.load(), Talk())
    click.echo(f"{folded} partitions folded", err=True)


@click.command()
@click.argument("column")
@pipeline_options
def drop(named: PipelineOptions, column: str) -> None:
    """Remove a stage's column from the table.

    COLUMN is an output of a stage. Its column files keep it: a pipeline that still has the stage brings it back with
    its next run.

    \b
    Example:
      builder drop lang_score --scale small
    """
    from builder.verbs.drop import drop_column

    loaded = named.load()
    drop_column(loaded, column)
    hint(f"column '{column}' is dropped; {loaded.command('fold')} takes it out of the partitions")
    owner = next((name for name, use in loaded.stages.items() if column in _outputs(use.stage)), None)
    if owner is not None:
        click.echo(f"stage '{owner}' of this pipeline has it: its next run brings it back", err=True)


def _outputs(stage: Any) -> list[str]:
    from builder.stages.contract import columns_of

    return [column.name for column in columns_of(stage)]
