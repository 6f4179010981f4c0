"""The proof of what lies next to a hybrid shard: its manifest and its statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.hybrid import manifest
from builder.hybrid.verify.problem import WRITE, Wrong, reason, removing, shown
from builder.hybrid.verify.sample import ProvenSample

#: Columns that the proof reads of a manifest. One that an older manifest lacks reads as null.
_COLUMNS = ("shard", "row", "member", "sha256", "origin", "provenance")


def described(path: Path) -> tuple[str, dict[str, Any]] | None:
    """What a manifest says that it describes: the digest of the plan, and what the shard holds. None if it is gone.

    Raises:
        Wrong: it is damaged.
    """
    try:
        return manifest.read_description(path)
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        raise Wrong(f"its manifest is damaged ({reason(error)})", WRITE) from error


def check_manifest(
    path: Path,
    said: dict[str, Any],
    found: dict[str, Any],
    shard: str,
    samples: Sequence[tuple[str, Sequence[str]]],
    edited: Mapping[int, ProvenSample],
) -> None:
    """Checks that a manifest names every member with its origin, and each edited one with its sha256.

    Args:
        said: what the manifest's footer says that the shard holds.
        found: what it holds.
        samples: of each row its key and the extensions of the source's members.
        edited: by row, what was proven of edited samples; of a dropped one that it has no members.

    Raises:
        Wrong: it says something else, or is damaged.
    """
    fix = removing(path, WRITE)
    for name, value in found.items():
        before = name == "source_end_mark"  # a manifest of older versions does not say it
        if said.get(name, before) != value:
            raise Wrong(f"its manifest says {name} = {said.get(name)}, and it has {value}", fix)
    try:
        with pq.ParquetFile(path) as file:
            have = set(file.schema_arrow.names)
            rows = file.read([name for name in _COLUMNS if name in have]).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise Wrong(f"its manifest is damaged ({reason(error)})", fix) from error
    wanted = list(_rows(shard, samples, edited))
    if len(rows) != len(wanted):
        raise Wrong(f"its manifest has {len(rows)} rows, and it has {len(wanted)} members", fix)
    for number, (row, should) in enumerate(zip(rows, wanted, strict=True)):
        for name, value in should.items():
            if row.get(name) != value:
                what = f"{name} = {shown(row.get(name))}, and should say {shown(value)}"
                raise Wrong(f"its manifest's row {number}, of member '{should['member']}', says {what}", fix)


def _rows(
    shard: str, samples: Sequence[tuple[str, Sequence[str]]], edited: Mapping[int, ProvenSample]
) -> Iterator[dict[str, Any]]:
    for row, (key, extensions) in enumerate(samples):
        proven = edited.get(row)
        if proven is None:
            for extension in extensions:
                yield _row(shard, row, f"{key}.{extension}", None, "source", None)
            continue
        provenance = proven.provenance
        for name, digest in proven.members:
            yield _row(shard, row, name, digest, "edited", provenance)
            provenance = None  # the first of a sample's members says it


def _row(shard: str, row: int, member: str, sha256: str | None, origin: str, provenance: str | None) -> dict[str, Any]:
    return dict(zip(_COLUMNS, (shard, row, member, sha256, origin, provenance), strict=True))


def check_statistics(path: Path, counts: dict[str, int], fix: str) -> None:
    """Checks that `_stats.json` says these counts.

    Raises:
        Wrong: it says others, is gone, or does not parse.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise Wrong(f"'{path.name}' is gone", fix) from None
    except ValueError:
        raise Wrong(f"'{path.name}' does not parse", fix) from None
    if found != counts:
        have, should = (json.dumps(some) for some in (found, counts))
        raise Wrong(f"'{path.name}' says {have}, and it should say {should}", fix)
