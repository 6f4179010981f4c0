"""Finds the samples that changed since an earlier ingest.

Owns `source_changed`, `source_was` and `source_digests`. An unchanged sample keeps its values, so that they are null in
a root whose sources never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from builder.sources.members import digest_of, place_of
from builder.table.column_files import identities
from builder.table.schema import IDENTITY, SOURCE_MEMBERS

#: Columns about where a sample is and which ingest read it, not about its content.
_NOT_COMPARED = {
    "shard", "row", "source_members", "source_run", "source_inputs", "source_changed", "source_was", "source_digests",
}  # fmt: skip
_KEPT = ("key", "uid", "source_members", "source_changed", "source_was", "source_digests")
_TYPES = {column.name: column.type for column in IDENTITY}


def digests(rows: pa.Table, read: Callable[[int, int], bytes]) -> list[dict[str, int]]:
    """The digests of every sample's picture, json and txt, in tar order.

    Args:
        rows: the rows of one shard, with `source_members`.
        read: called with offset and size; returns the bytes.
    """
    result = []
    for members in rows["source_members"].to_pylist():
        of_sample = {}
        for name in SOURCE_MEMBERS:
            place = place_of(members, name)
            of_sample[name] = digest_of(name, None if place is None else read(place["data"], place["size"]))
        result.append(of_sample)
    return result


def follow(
    rows: pa.Table, earlier: Iterable[pa.Table], known: Sequence[dict[str, int]] | None, run: str
) -> tuple[pa.Table, int]:
    """Adds the history of samples to the rows of a shard; returns the rows and how many samples changed.

    A sample that is missing in the generation before counts as changed: it may have had answers earlier.

    Args:
        earlier: the tables that ingest has committed, the newest first; older ones are read only while samples are
            still missing.
        known: the digests of the rows; None if the shard is unchanged on disk: then the old digests are kept.
        run: this ingest.
    """
    new = identities(rows["key"].to_pylist())
    missing = dict(zip(new, range(len(new)), strict=True))
    old: dict[int, dict[str, Any]] = {}
    same: set[int] = set()
    for depth, table in enumerate(earlier):
        pairs = [(missing.pop(i), row) for row, i in enumerate(identities(table["key"].to_pylist())) if i in missing]
        there = rows.take(pa.array([at for at, _ in pairs], pa.int64()))
        was = table.take(pa.array([row for _, row in pairs], pa.int64()))
        before = was.select([name for name in _KEPT if name in was.column_names]).to_pylist()
        old |= {at: row for (at, _), row in zip(pairs, before, strict=True)}
        if depth == 0:
            same = {at for (at, _), is_same in zip(pairs, _are_same(was, there), strict=True) if is_same}
        if not missing:
            break
    found: dict[str, list[Any]] = {name: [None] * len(new) for name in ("source_changed", "source_was")}
    own = list(known) if known is not None else [old.get(at, {}).get("source_digests") for at in range(len(new))]
    changed = 0
    for at in range(len(new)):
        before_it = old.get(at, {})
        differing = _differing(before_it.get("source_digests"), own[at])
        if at in same and not differing:
            found["source_changed"][at] = before_it.get("source_changed")
            found["source_was"][at] = before_it.get("source_was")
            continue
        changed += 1
        found["source_changed"][at] = run
        found["source_was"][at] = _former(before_it) if before_it else None
    for name, values in {**found, "source_digests": own}.items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values, _TYPES[name]))
    return rows, changed


def _are_same(old: pa.Table, new: pa.Table) -> list[bool]:
    """Which rows have the same values in the columns that both tables have, and members of the same names and sizes."""
    same = [True] * new.num_rows
    types = {field.name: field.type for field in old.schema}
    for name in new.column_names:
        if name not in _NOT_COMPARED and types.get(name) == new[name].type and not old[name].equals(new[name]):
            pairs = zip(same, old[name].to_pylist(), new[name].to_pylist(), strict=True)
            same = [is_same and (a == b or repr(a) == repr(b)) for is_same, a, b in pairs]  # NaN equals nothing
    sides = (side["source_members"].to_pylist() for side in (old, new))
    return [is_same and _sizes(a) == _sizes(b) for is_same, a, b in zip(same, *sides, strict=True)]


def _sizes(members: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(member["ext"], member["size"]) for member in members]


def _differing(old: dict[str, int] | None, new: dict[str, int] | None) -> list[str]:
    """The members whose digests are both known and differ."""
    return [name for name in SOURCE_MEMBERS if old and new and old[name] != new[name]]


def _former(row: dict[str, Any]) -> dict[str, Any]:
    """`source_was` of a sample that changed: its state before the first change."""
    was: dict[str, Any] | None = row.get("source_was")
    if was is None:
        members = [{"ext": ext, "size": size, "digest": None} for ext, size in _sizes(row["source_members"])]
        was = {"uid": row["uid"], "members": members}
    known = row.get("source_digests") or {}
    for name in known:
        then, now = place_of(was["members"], name), place_of(row["source_members"], name)
        if then and now and then["digest"] is None and _sizes([then]) == _sizes([now]):
            then["digest"] = known[name]
    return was
