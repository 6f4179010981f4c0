"""The folder of hybrid shards: which are up to date, `sizes.json`, free space, and that no source lies there."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from builder import machine
from builder.errors import ConfigError, ShardError
from builder.hybrid.manifest import read_description
from builder.hybrid.shard_plan import ShardPlan
from builder.machine import Sort
from builder.store import files
from builder.store.layout import Layout

#: Bytes by which an edited sample's json and headers may grow, for the estimate of disk space.
_ADDED = 4096


def is_written(layout: Layout, plan: ShardPlan) -> bool:
    """Whether a hybrid shard is up to date: made from this plan and from the source as it is on disk now."""
    try:
        digest, output = read_description(layout.manifest(plan.shard))
        size = layout.hybrid(plan.shard).stat().st_size
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    except OSError as error:
        if machine.sort_of(error) is not Sort.ACCESS:
            raise
        return False  # its disk no longer returns it, so it is written again
    return (digest, output["source"], output["size"]) == (plan.digest, list(plan.on_disk), size)


def sizes_of(layout: Layout, plan: ShardPlan) -> tuple[int, int]:
    """The most bytes that a hybrid shard takes while it is written, and how many more than the one that it replaces."""
    size = plan.source.size + sum(edit.image[2] + _ADDED for edit in plan.edits.values() if edit.image)
    try:
        return size, size - layout.hybrid(plan.shard).stat().st_size
    except FileNotFoundError:
        return size, size


def free_bytes(layout: Layout) -> int:
    """Free bytes on the disk of the hybrid shards, whose folder may not exist yet."""
    folder = layout.shards.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_apart(layout: Layout, sources: Sequence[Path]) -> None:
    """Raises ConfigError if a source shard lies in the folder of hybrid shards."""
    output = layout.shards.resolve()
    folders: dict[Path, Path] = {}
    for source in sources:
        folder = source.parent
        if folder not in folders:
            folders[folder] = folder.resolve()
        if folders[folder] == output or (source.is_symlink() and source.resolve().parent == output):
            raise ConfigError(
                "hybrid shards would be written into the folder of the source",
                where={"source": source, "output": layout.shards},
                fix="set dataset.root to another folder; hybrid shards go to its shards/, or to [write] folder",
            )


def write_sizes(layout: Layout) -> None:
    """Writes `sizes.json`: {tar name: samples} for every hybrid shard. open_clip and DataComp read it.

    Raises:
        ShardError: the statistics of a hybrid shard do not record how many samples it holds.
    """
    sizes = {}
    for shard in layout.stats_names():
        hybrid = layout.hybrid(shard)
        if hybrid.exists():
            sizes[hybrid.name] = _recorded_samples(layout.stats(shard), hybrid)
    text = json.dumps(sizes, indent=1).encode()
    if not layout.sizes().exists() or layout.sizes().read_bytes() != text:
        files.write_atomic(layout.sizes(), text)


def _recorded_samples(statistics: Path, hybrid: Path) -> int:
    with contextlib.suppress(ShardError):
        found = files.read_object(statistics).get("successes")
        if isinstance(found, int):
            return found
    raise ShardError(
        f"'{statistics.name}' does not say how many samples its shard holds",
        where={"file": statistics},
        fix=f"rm {shlex.quote(str(hybrid))}, then builder write, which writes the shard again if the table has it",
    )
