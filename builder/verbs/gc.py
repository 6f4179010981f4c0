"""The verb `gc`: what nothing needs goes."""

from __future__ import annotations

import time
from pathlib import Path

from builder.engine import runs
from builder.errors import ConfigError
from builder.progress import Talk
from builder.store import files
from builder.store.layout import names
from builder.table import partitions, root_schema, sweeps
from builder.table.pointers import pointers_of
from builder.verbs.pipeline import Pipeline

#: A run of another host is taken for alive so long, in seconds: its process cannot be asked.
_ALIVE_ELSEWHERE_S = 48 * 3600


def collect_garbage(pipeline: Pipeline, talk: Talk, *, dry_run: bool) -> sweeps.Sweep:
    """Deletes what nothing needs: old generations, dead temp files, edits tars and runs that nothing points to."""
    layout = pipeline.layout
    layout.check_folders()
    sweep = sweeps.Sweep()
    pointers = pointers_of(root_schema.load_schema(layout)[1])
    alive: set[str] = set()
    idle = [name for name in names(layout.runs) if _is_idle(layout.run(name))]  # these commit no more rows
    shards = layout.shard_names()
    with talk.bar("gc", len(shards), "shards") as bar:
        for done, shard in enumerate(shards, 1):
            alive |= sweeps.sweep_shard(layout, shard, pointers, sweep, dry_run=dry_run)
            if not dry_run:
                partitions.heal(layout, [shard])
            bar.update(done)
    sweeps.sweep_temps(layout, sweep, dry_run=dry_run)
    for name in idle:
        if name not in alive:
            sweep.add(layout.run(name))
            if not dry_run:
                sweeps.delete(layout.run(name))
    return sweep


def _is_idle(folder: Path) -> bool:
    """Whether a folder is a run whose process is gone; one of another host is believed to live for two days."""
    try:
        data = runs.read(folder)
    except ConfigError:
        return False  # nobody's to sweep: a run has had its description, whole, as long as its name
    host, pid = data.get("host"), data.get("pid")
    if not isinstance(host, str) or not isinstance(pid, int):
        return False
    lives = files.process_lives(host, pid)
    return time.time() - folder.stat().st_mtime > _ALIVE_ELSEWHERE_S if lives is None else not lives
