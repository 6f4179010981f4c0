"""The folder of hybrid shards: which are up to date, `sizes.json`, the room that writing takes, no sources in it."""

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

#: Bytes that an edited sample's json and headers may grow by, as the estimate of disk space counts them.
_ADDED = 4096


def is_written(layout: Layout, plan: ShardPlan) -> bool:
    """Whether a hybrid shard is up to date: made of the plan's edits and of the source as it is on disk now."""
    try:
        digest, output = read_description(layout.manifest(plan.shard))
        size = layout.hybrid(plan.shard).stat().st_size
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    except OSError as error:
        if machine.sort_of(error) is not Sort.ACCESS:
            raise
        return False  # its disk does not give it any more, so it is written again
    return (digest, output["source"], output["size"]) == (plan.digest, list(plan.on_disk), size)


def sizes_of(layout: Layout, plan: ShardPlan) -> tuple[int, int]:
    """Bytes that a hybrid shard takes at most while it is written, and by how much it outgrows what it replaces."""
    size = plan.source.size + sum(edit.image[2] + _ADDED for edit in plan.edits.values() if edit.image)
    try:
        return size, size - layout.hybrid(plan.shard).stat().st_size
    except FileNotFoundError:
        return size, size


def free_bytes(layout: Layout) -> int:
    """Free bytes where hybrid shards go, or will go."""
    folder = layout.shards.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_apart(layout: Layout, sources: Sequence[Path]) -> None:
    """Raises ConfigError if hybrid shards would lie where a source shard lies."""
    output = layout.shards.resolve()
    folders: dict[Path, Path] = {}
    for source in sources:
        folder = source.parent
        if folder not in folders:
            folders[folder] = folder.resolve()
        if folders[folder] == output or (source.is_symlink() and source.resolve().parent == output):
            raise ConfigError(
                "hybrid shards would be written where the source lies",
                where={"source": source, "output": layout.shards},
                fix="set dataset.root to another folder: hybrid shards go to its shards/, or where [write] folder says",
            )


def write_sizes(layout: Layout) -> None:
    """Writes `sizes.json`, {tar name: samples}, of every hybrid shard: open_clip and DataComp read it.

    Raises:
        ShardError: the statistics of a hybrid shard do not say how many samples it holds.
    """
    sizes = {}
    for shard in layout.stats_names():
        hybrid = layout.hybrid(shard)
        if hybrid.exists():
            sizes[hybrid.name] = _samples_said(layout.stats(shard), hybrid)
    text = json.dumps(sizes, indent=1).encode()
    if not layout.sizes().exists() or layout.sizes().read_bytes() != text:
        files.write_atomic(layout.sizes(), text)


def _samples_said(statistics: Path, hybrid: Path) -> int:
    with contextlib.suppress(ShardError):
        found = files.read_object(statistics).get("successes")
        if isinstance(found, int):
            return found
    raise ShardError(
        f"'{statistics.name}' does not say how many samples its shard holds",
        where={"file": statistics},
        fix=f"rm {shlex.quote(str(hybrid))}, then builder write: a shard of the table is written again",
    )
