"""The verb `gc`: deletes what nothing needs."""

from __future__ import annotations

from builder.engine import runs
from builder.errors import ConfigError
from builder.executors.by_name import liveness_of
from builder.progress import Talk
from builder.store.layout import RunFiles, names
from builder.store.owners import is_abandoned
from builder.table import partitions, root_schema, sweeps
from builder.table.pointers import pointers_of
from builder.verbs.pipeline import Pipeline


def collect_garbage(pipeline: Pipeline, talk: Talk, *, dry_run: bool) -> sweeps.Sweep:
    """Deletes what nothing needs: old generations, dead temp files, edits tars and runs that nothing points to."""
    layout = pipeline.layout
    layout.check_folders()
    sweep = sweeps.Sweep()
    pointers = pointers_of(root_schema.load_schema(layout)[1])
    alive: set[str] = set()
    idle = [name for name in names(layout.runs) if _is_idle(RunFiles(layout, name))]  # these will commit no rows
    shards = layout.shard_names()
    with talk.bar("gc", len(shards), "shards") as bar:
        for done, shard in enumerate(shards, 1):
            alive |= sweeps.sweep_shard(layout, shard, pointers, sweep, dry_run=dry_run)
            if not dry_run:
                partitions.heal(layout, [shard])
            bar.update(done)
    sweeps.sweep_temps(layout, sweep, liveness_of, dry_run=dry_run)
    for name in idle:
        if name not in alive:
            sweep.add(layout.run(name))
            if not dry_run:
                sweeps.delete(layout.run(name))
    return sweep


def _is_idle(run: RunFiles) -> bool:
    """Whether a folder is a run that nobody works on any longer."""
    try:
        return is_abandoned(run.folder, liveness_of(runs.read(run)))
    except (ConfigError, ValueError):
        # A run gets its name together with its whole description: a folder without one is not a run.
        return False
