"""Older rules: which answers an earlier version of a stage, or of ingest, gave, and what is different now.

A raised version starts nothing: answers stay until somebody asks for new ones. This says how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from builder import runs
from builder.errors import ConfigError
from builder.layout import Layout
from builder.query import Samples
from builder.stage import Stage


@dataclass(frozen=True)
class OlderRule:
    """Answers of one older version.

    Attributes:
        stage: the stage that gave them, `ingest` for rows of the source.
        version: the version that gave them.
        count: rows, or shards where `stage` is `ingest`.
        changes: what newer versions changed, the oldest first.
        command: what gives new answers.
    """

    stage: str
    version: str
    count: int
    changes: list[str]
    command: str


def of_ingest(versions: Iterable[str], changes: Mapping[str, str]) -> list[OlderRule]:
    """Shards that an older version of ingest has read.

    Args:
        versions: of each shard of the table.
    """
    return _older("ingest", Counter(versions), changes, "ingest --redo")


def of_stages(layout: Layout, samples: Samples, stages: Sequence[Stage]) -> list[OlderRule]:
    """Rows that older versions of these stages have answered, by stage and version.

    A row whose run is gone from `runs/`, or damaged, counts as one of an unknown version: every change is told.
    """
    changed = [stage for stage in stages if getattr(stage, "changes", {})]
    if not changed:
        return []
    by_run = ", ".join(f"histogram(coalesce({s.name}_run, '')) filter ({s.name}_status is not null)" for s in changed)
    [answers] = samples.fixed(f"select {by_run} from samples")  # one pass: partitions are many
    found: list[OlderRule] = []
    for stage, runs_of in zip(changed, answers, strict=True):
        counts: Counter[str] = Counter()
        for run, rows in (runs_of or {}).items():
            counts[_version_of(layout, run)] += rows
        found += _older(stage.name, counts, getattr(stage, "changes", {}), f"stage {stage.name} --stale")
    return found


def _version_of(layout: Layout, run: str) -> str:
    try:
        return str(runs.read(layout.run(run)).get("version", "unknown")) if run else "unknown"
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
