"""Older rules: counts answers given by an earlier version of a stage or of ingest, and says what is different now.

A new version starts nothing by itself: answers stay until the user asks for new ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from builder.engine import runs
from builder.errors import ConfigError
from builder.stages.contract import Stage
from builder.store.layout import Layout, RunFiles


@dataclass(frozen=True)
class OlderRule:
    """Answers of one older version.

    Attributes:
        stage: the stage that gave them, `ingest` for rows of the source.
        version: the version that gave them.
        count: how many rows, or shards if `stage` is `ingest`.
        changes: what newer versions changed, the oldest first.
        command: the command that gives new answers.
    """

    stage: str
    version: str
    count: int
    changes: list[str]
    command: str


def of_ingest(versions: Mapping[str, int], changes: Mapping[str, str]) -> list[OlderRule]:
    """Shards read by an older version of ingest.

    Args:
        versions: how many shards of the table each version has read.
    """
    return _older("ingest", versions, changes, "ingest --redo")


def of_stage(layout: Layout, stage: Stage, by_run: Mapping[str, int]) -> list[OlderRule]:
    """Rows answered by older versions of a stage, by version.

    If the run of a row is gone from `runs/` or damaged, its version is unknown: every change is reported.

    Args:
        by_run: how many rows each run has answered.
    """
    if not stage.changes:
        return []
    counts: Counter[str] = Counter()
    for run, rows in by_run.items():
        counts[_version_of(layout, run)] += rows
    return _older(stage.name, counts, stage.changes, f"stage {stage.name} --stale")


def _version_of(layout: Layout, run: str) -> str:
    try:
        return str(runs.read(RunFiles(layout, run)).get("version", "unknown")) if run else "unknown"
    except ConfigError:
        return "unknown"


def _older(stage: str, counts: Mapping[str, int], changes: Mapping[str, str], command: str) -> list[OlderRule]:
    found = []
    for version, count in sorted(counts.items()):
        known = list(changes)
        newer = known[known.index(version) + 1 :] if version in changes else known
        if newer:
            found.append(OlderRule(stage, version, count, [changes[name] for name in newer], command))
    return found
