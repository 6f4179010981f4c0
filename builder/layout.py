"""Every path under a dataset root, and where installed SQL and pipelines lie.

Owns names on disk. Reads no file's content.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from builder.files import TEMP_SUFFIX

_GENERATION = re.compile(r"(?:(?P<stem>.+)\.)?g(?P<number>\d{6,})\.(?:parquet|json)")


@dataclass(frozen=True)
class Layout:
    """The paths of one dataset root."""

    root: Path

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def columns(self) -> Path:
        return self.root / "columns"

    @property
    def edits(self) -> Path:
        return self.root / "edits"

    @property
    def schema(self) -> Path:
        return self.root / "schema"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def shards(self) -> Path:
        """Where hybrid shards go."""
        return self.root / "shards"

    def partition(self, shard: str) -> Path:
        return self.samples / f"{shard}.parquet"

    def column_folder(self, shard: str) -> Path:
        return self.columns / shard

    def column_file(self, shard: str, stage: str, generation: int) -> Path:
        return self.columns / shard / f"{stage}.g{generation:06d}.parquet"

    def edits_tar(self, shard: str, attempt: str, number: int) -> Path:
        return self.edits / shard / f"{attempt}-{number}.tar"

    def schema_file(self, generation: int) -> Path:
        return self.schema / f"g{generation:06d}.json"

    def run(self, run: str) -> Path:
        return self.runs / run

    def hybrid(self, shard: str) -> Path:
        return self.shards / f"{shard}.tar"

    def stats(self, shard: str) -> Path:
        return self.shards / f"{shard}_stats.json"

    def sizes(self) -> Path:
        return self.shards / "sizes.json"

    def manifest(self, shard: str) -> Path:
        return self.shards / "manifest" / f"{shard}.parquet"

    def shard_names(self) -> list[str]:
        """Every shard of the table, sorted: those that ingest has committed a column file of."""
        folded = set(self.partitions())
        return [shard for shard in names(self.columns) if shard in folded or self._has_source(shard)]

    def _has_source(self, shard: str) -> bool:
        return any(name.startswith("source.g") for name in names(self.column_folder(shard)))

    def partitions(self) -> list[str]:
        """Every shard that has a partition, sorted."""
        return [name[: -len(".parquet")] for name in names(self.samples) if name.endswith(".parquet")]


@dataclass(frozen=True)
class RunFiles:
    """The paths of one run directory."""

    folder: Path

    @property
    def description(self) -> Path:
        return self.folder / "run.json"

    @property
    def workset(self) -> Path:
        return self.folder / "workset.parquet"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def task(self, number: int) -> Path:
        return self.folder / "tasks" / f"{number:05d}.json"

    def result(self, number: int) -> Path:
        return self.folder / "tasks" / f"{number:05d}.result.json"

    def in_hand(self, number: int) -> Path:
        """The batch that a task is working on, and how often the process died in it."""
        return self.folder / "tasks" / f"{number:05d}.batch.json"

    def log(self, number: int) -> Path:
        return self.logs / f"{number:05d}.log"

    def failures(self, number: int) -> Path:
        """Failures that did not replace an answer, one json a line."""
        return self.logs / f"{number:05d}.failures.jsonl"


def names(folder: Path) -> list[str]:
    """Names in a folder, sorted, temp files left out; none if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.endswith(TEMP_SUFFIX))
    except FileNotFoundError:
        return []


def generation_of(name: str) -> tuple[str, int] | None:
    """('faces', 3) for 'faces.g000003.parquet', ('', 2) for 'g000002.json', None for a name of another form."""
    match = _GENERATION.fullmatch(name)
    return (match["stem"] or "", int(match["number"])) if match else None


def shard_name(path: Path) -> str:
    """A shard's name: its file name without `.tar`."""
    return path.name[: -len(".tar")] if path.name.endswith(".tar") else path.name


_PACKAGE = Path(__file__).parent


def installed(kind: str) -> Path:
    """The folder of `sql` or `pipelines` as installed: in a wheel inside the package, else beside it."""
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def find(kind: str, name: str) -> tuple[Path | None, list[Path]]:
    """Looks a file up: `./sql/` and `./pipelines/` first, then as installed; also returns the places it looked at."""
    places = [Path(kind) / name, installed(kind) / name]
    return next((place for place in places if place.is_file()), None), places
