"""Finds and deletes files that are no longer needed: old generations, edits tars, temp files."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from builder.store import files
from builder.store.layout import Layout, attempt_of
from builder.store.owners import AskLiveness
from builder.table.column_files import (
    KEPT_GENERATIONS,
    commit_file,
    listing,
    newest_content,
    read_column_file,
    read_rows,
)
from builder.table.pointers import pointers_in
from builder.table.schema import SOURCE

# --- sweep ---


@dataclass
class Sweep:
    """The files and folders that a sweep deletes, and their bytes."""

    paths: list[Path] = field(default_factory=list)
    size: int = 0

    def add(self, path: Path) -> None:
        """Adds a file, or a folder with everything in it."""
        with contextlib.suppress(FileNotFoundError):
            inside = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
            self.size += sum(entry.stat().st_size for entry in inside)
            self.paths.append(path)


def sweep_shard(layout: Layout, shard: str, stages: Iterable[str], sweep: Sweep, *, dry_run: bool) -> set[str]:
    """Deletes files of one shard that are no longer needed: old generations, edits tars without a pointer to them.

    An unreferenced edits tar may belong to an attempt that is only paused. So a generation that records the attempt as
    swept is committed first, and only tars that are still unreferenced after that are deleted.

    Args:
        stages: those that write edits tars.

    Returns:
        The runs that rows of this shard name.
    """
    doomed, pointing = files.retry_listing(partial(_unreferenced, layout, shard, KEPT_GENERATIONS))
    if doomed:  # the fence adds a generation: tars that only the oldest kept one points to are then unreferenced, too
        doomed, pointing = files.retry_listing(partial(_unreferenced, layout, shard, KEPT_GENERATIONS - 1))
    if doomed and not dry_run:
        attempts = sorted({attempt_of(path) for path in doomed})
        for stage in sorted({*stages, *pointing}):
            _fence(layout, shard, stage, attempts)
        still, _ = files.retry_listing(partial(_unreferenced, layout, shard, KEPT_GENERATIONS))
        doomed = [path for path in still if path in doomed]
    old, runs = files.retry_listing(partial(_superseded, layout, shard))
    for path in [*doomed, *old]:
        sweep.add(path)
        if not dry_run:
            files.remove(path)
    return runs


def sweep_temps(layout: Layout, sweep: Sweep, liveness: AskLiveness, *, dry_run: bool) -> None:
    """Deletes temp files and temp folders of dead processes in the root, and next to hybrid shards outside of it.

    Args:
        liveness: as for `files.is_dead_temp`.
    """
    _sweep_temps_in(os.walk(layout.root), sweep, liveness, dry_run=dry_run)
    if layout.output is not None:
        for folder in (layout.shards, layout.manifests):
            _sweep_temps_in(itertools.islice(os.walk(folder), 1), sweep, liveness, dry_run=dry_run)


def _sweep_temps_in(
    walk: Iterable[tuple[str, list[str], list[str]]], sweep: Sweep, liveness: AskLiveness, *, dry_run: bool
) -> None:
    for folder, inner, inside in walk:
        dead = {name for name in (*inner, *inside) if files.is_dead_temp(Path(folder, name), liveness)}
        inner[:] = sorted(set(inner) - dead)
        for name in sorted(dead):
            sweep.add(Path(folder, name))
            if not dry_run:
                delete(Path(folder, name))


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it exists. A folder is renamed first: a kill leaves no half of it in place."""
    if not path.is_dir() or path.is_symlink():
        files.remove(path)
        return
    files.check_no_link(path)
    temp = files.temp_path(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(temp)
    shutil.rmtree(temp, ignore_errors=True)


def _unreferenced(layout: Layout, shard: str, kept: int) -> tuple[list[Path], set[str]]:
    """Edits tars of a shard to which none of the newest `kept` generations points, and the stages with pointers.

    Pointers are found by the columns of the files, not of the root: a column dropped from the root may come back.
    """
    named: set[str] = set()
    stages: set[str] = set()
    for stage, generations in listing(layout, shard, fresh=True).items():
        for generation in generations[-kept:]:
            path = layout.column_file(shard, stage, generation)
            for column in read_column_file(path, pointers_in(pq.read_schema(path))).table.columns:
                stages.add(stage)
                named.update(column.unique().to_pylist())
    return [path for path in layout.edits_tars(shard) if layout.pointer(path) not in named], stages


def _fence(layout: Layout, shard: str, stage: str, attempts: list[str]) -> None:
    """Commits a generation that records attempts as swept; returns when the newest generation does."""
    while True:
        generation, content = files.retry_listing(partial(newest_content, layout, shard, stage))
        swept = tuple(dict.fromkeys([*content.swept, *attempts]))
        if swept == content.swept:
            return
        commit_file(layout, shard, stage, generation + 1, replace(content, swept=swept))


def _superseded(layout: Layout, shard: str) -> tuple[list[Path], set[str]]:
    """Column files that are no longer needed, and the runs that the newest ones name."""
    found = listing(layout, shard)
    old = [
        layout.column_file(shard, stage, generation)
        for stage, generations in found.items()
        for generation in generations[:-KEPT_GENERATIONS]
        if stage != SOURCE
    ]
    old += _superseded_sources(layout, shard, found)
    runs: set[str] = set()
    for stage, generations in found.items():
        column = f"{stage}_run"
        content = read_column_file(layout.column_file(shard, stage, generations[-1]), [column])
        runs.update(run for run in content.table[column].unique().to_pylist() if run)
    return old, runs


def _superseded_sources(layout: Layout, shard: str, found: dict[str, list[int]]) -> list[Path]:
    """Column files of ingest that no kept column file needs: for each `rows`, one is enough to realign answers."""
    paths = [layout.column_file(shard, SOURCE, generation) for generation in reversed(found.get(SOURCE, []))]
    kept, superseded = paths[:KEPT_GENERATIONS], paths[KEPT_GENERATIONS:]
    if not superseded:
        return []
    needed = _needed_rows(layout, shard, found) - {read_rows(path) for path in kept}
    old = []
    for path in superseded:
        rows = read_rows(path)
        if rows in needed:
            needed.remove(rows)
        else:
            old.append(path)
    return sorted(old)


def _needed_rows(layout: Layout, shard: str, found: dict[str, list[int]]) -> set[str]:
    """The `rows` of kept column files: a source generation of each is needed to realign them."""
    kept = [
        layout.column_file(shard, stage, generation)
        for stage, generations in found.items()
        if stage != SOURCE
        for generation in generations[-KEPT_GENERATIONS:]
    ]
    return {read_rows(path) for path in kept}
