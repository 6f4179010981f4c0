"""The proof of the files next to a hybrid shard: its manifest and its statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder.hybrid import manifest
from builder.hybrid.verify.problem import WRITE, Wrong, quoted_value, reason, removing
from builder.hybrid.verify.sample import ProvenSample

#: Columns of a manifest that are checked. One that an older manifest lacks reads as null.
_COLUMNS = ("shard", "row", "member", "sha256", "origin", "provenance")


def described(path: Path) -> tuple[str, dict[str, Any]] | None:
    """The contents of a manifest's footer: the digest of the plan, and what the shard holds. None if it is gone.

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
        said: what the shard holds according to the manifest's footer.
        found: what it really holds.
        samples: key and source extensions of each row.
        edited: by row, the edited samples that were proven; a dropped one has no members.

    Raises:
        Wrong: it differs, or is damaged.
    """
    fix = removing(path, WRITE)
    for name, value in found.items():
        before = name == "source_end_mark"  # manifests of older versions do not record it
        if said.get(name, before) != value:
            raise Wrong(f"its manifest says {name} = {said.get(name)}, but it has {value}", fix)
    try:
        with pq.ParquetFile(path) as file:
            have = set(file.schema_arrow.names)
            rows = file.read([name for name in _COLUMNS if name in have]).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise Wrong(f"its manifest is damaged ({reason(error)})", fix) from error
    wanted = list(_rows(shard, samples, edited))
    if len(rows) != len(wanted):
        raise Wrong(f"the manifest has {len(rows)} rows, but the shard has {len(wanted)} members", fix)
    for number, (row, should) in enumerate(zip(rows, wanted, strict=True)):
        for name, value in should.items():
            if row.get(name) != value:
                what = f"{name} = {quoted_value(row.get(name))}, but should say {quoted_value(value)}"
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
            provenance = None  # only the first member of a sample has it


def _row(shard: str, row: int, member: str, sha256: str | None, origin: str, provenance: str | None) -> dict[str, Any]:
    return dict(zip(_COLUMNS, (shard, row, member, sha256, origin, provenance), strict=True))


def check_statistics(path: Path, counts: dict[str, int], fix: str) -> None:
    """Checks that `_stats.json` says these counts.

    Raises:
        Wrong: it says otherwise, is gone, or does not parse.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise Wrong(f"'{path.name}' is gone", fix) from None
    except ValueError:
        raise Wrong(f"'{path.name}' does not parse", fix) from None
    if found != counts:
        have, should = (json.dumps(some) for some in (found, counts))
        raise Wrong(f"'{path.name}' says {have}, but should say {should}", fix)
