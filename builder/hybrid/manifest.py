"""The manifest of a hybrid shard: its columns, and what its footer says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from builder import machine
from builder.hybrid.shard_plan import ShardPlan
from builder.machine import Sort
from builder.store.layout import Layout
from builder.table import partitions

DIGEST = b"builder.digest"
INFO = b"builder.output"


@dataclass
class Written:
    """What one hybrid shard holds.

    Attributes:
        rows: samples of the source shard.
        edited: samples that differ, dropped ones not counted.
        size: bytes of the tar.
        copied: of these, bytes copied from the source.
        source_end_mark: whether zeros close the source; a hybrid shard has them always.
    """

    rows: int = 0
    edited: int = 0
    dropped: int = 0
    size: int = 0
    copied: int = 0
    source_end_mark: bool = True

    @property
    def statistics(self) -> dict[str, int | bool]:
        """What `_stats.json` says of it."""
        counts: dict[str, int | bool] = {
            "count": self.rows, "successes": self.rows - self.dropped, "edited": self.edited
        }  # fmt: skip
        return counts if self.source_end_mark else {**counts, "source_end_mark": False}


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
        return False  # it is written anew, where its disk gives it no more
    return (digest, output["source"], output["size"]) == (plan.digest, list(plan.on_disk), size)


def read_description(manifest: Path) -> tuple[str, dict[str, Any]]:
    """The digest that a hybrid shard was made of, and what it holds, as its manifest says.

    Raises:
        FileNotFoundError: there is no manifest.
        pyarrow.ArrowInvalid: it is damaged, or no manifest.
    """
    with manifest.open("rb") as file:
        metadata = partitions.footer_values(file, (DIGEST, INFO))
    try:
        info = json.loads((metadata or {})[INFO])
        if not {"source", "size"} <= info.keys():
            raise ValueError
        return (metadata or {})[DIGEST].decode(), info
    except (KeyError, ValueError, AttributeError) as error:
        raise pa.ArrowInvalid("it says nothing of a hybrid shard") from error
