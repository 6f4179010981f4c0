"""Finds answers that are out of date: their sample changed since, and the answer's own inputs with it.

Owns what a row records about the inputs of its answer, and how that is compared. `<stage>_inputs` is a hash of the
values from the work SQL, the uid, a generated image that was read, and the stage's version and options.
`<stage>_digest` is a digest of the bytes of the source that were read. `<stage>_sample` is the ingest that had last
found the sample changed. An answer is out of date if

- it was made from other bytes than an ingest of the changed shard has found, or
- an ingest has found its sample changed since, and the hash of its inputs has changed. That hash is taken with the
  version and the options of the answer's own run: a new version or new options make an answer stale, not out of date.

Unchanged samples cost nothing: nulls are compared with nulls. Answers of versions that recorded no digest have the
extension and size of every member in their hash instead; these are taken from `source_was`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from builder import formats
from builder.errors import ShardError
from builder.sources.members import EDIT, NOTHING_READ, place_of
from builder.stages.contract import Stage
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table.inputs_hash import inputs_hashes

Mask = npt.NDArray[np.bool_]
#: Results of `suspicion`: the sample did not change, its answer has to be compared, or was made from other bytes.
SAME, SUSPECT, OTHER_BYTES = 0, 1, 2


def source_members(stage: Stage) -> list[str]:
    """The members of the source that a stage reads."""
    return [member for member in stage.members if member != EDIT]


def suspicion(stage: Stage) -> str:
    """SQL over `samples s`: whether the sample of an answer changed since."""
    name, others = stage.name, "false"
    if members := source_members(stage):
        digest = f"s.source_digests.{members[0]}"
        for member in members[1:]:
            digest = f"xor({digest}, s.source_digests.{member})"
        others = f"(s.{name}_digest <> {NOTHING_READ} and s.{name}_digest <> {digest})"
    return (
        f"(case when s.{name}_status is null then {SAME} when {others} then {OTHER_BYTES}"
        f" when s.source_changed is distinct from s.{name}_sample then {SUSPECT} else {SAME} end)::utinyint"
    )


def recorded(stage: Stage) -> list[str]:
    """SQL over `samples s`: what a row records about the inputs of its answer, and inputs that the work SQL lacks.

    These are the columns that `inputs_now`, `are_out_of_date` and `are_stale` read in addition to the stage's inputs.
    """
    name = stage.name
    is_old = f"s.{name}_status is not null and s.{name}_digest is null"
    parts = [
        "s.uid",
        f"s.{name}_run as {name}_by",
        f"s.{name}_inputs as {name}_previous",
        f"({is_old}) as {name}_is_old",
        f"case when {is_old} then s.source_was end as {name}_was",
    ]
    if source_members(stage):
        text = "list_transform({}, lambda m: m.ext || ' ' || m.size)::varchar"
        was, now = text.format("s.source_was.members"), text.format("s.source_members")
        sizes = f"case when s.source_was is null then {now} else {was} end"
        parts += [
            f"case when {is_old} then {sizes} end as {name}_sizes",
            f"case when {is_old} and s.source_was is not null then s.source_members end as {name}_members",
            f"case when {is_old} and s.source_was is not null then s.source_digests end as {name}_digests",
        ]
    if EDIT in stage.members:
        parts.append(f"s.image_sha256 as {name}_edit")
    return parts


def inputs_now(rows: pa.Table, stage: Stage, signature: str) -> pa.UInt64Array:
    """The value of `<stage>_inputs` for rows that are to be answered.

    Args:
        signature: `stages.signature.options_hash`.
    """
    values = _values(rows, stage, ["uid", *_named(stage, ["edit"])])
    return inputs_hashes(signature, values, _format_asked(rows, stage))


def _format_asked(rows: pa.Table, stage: Stage) -> list[Any] | None:
    """The format asked for each picture; None for jpg, which has the same hash as before there was a choice."""
    name = f"{stage.name}_format_asked"
    if name not in rows.column_names:
        return None
    return [None if asked == formats.JPG else asked for asked in rows[name].to_pylist()]


def _values(rows: pa.Table, stage: Stage, more: Sequence[str]) -> list[list[Any]]:
    """The stage's inputs and the columns `more`, each as a list."""
    names = [*(field.name for field in stage.inputs), *more]
    return [rows[name].to_pylist() for name in names] or [[None] * rows.num_rows]


def _named(stage: Stage, parts: Sequence[str]) -> list[str]:
    """The names of those columns of `recorded` that this stage has."""
    has = {"sizes": bool(source_members(stage)), "edit": EDIT in stage.members}
    return [f"{stage.name}_{part}" for part in parts if has[part]]


def are_stale(rows: pa.Table, stage: Stage, signature: str) -> Mask:
    """Which rows have no answer, or one made with other inputs, another version or other options than now."""
    others = rows[f"{stage.name}_suspect"].to_numpy() == OTHER_BYTES
    differ = ~_are_same(rows, stage, [signature] * rows.num_rows)
    return np.asarray(differ | others | _was_other(rows, stage))


def are_out_of_date(rows: pa.Table, stage: Stage, signature: str, layout: Layout) -> Mask:
    """Which answers are out of date; `rows` has the columns of `recorded`, and `suspicion` as `<stage>_suspect`.

    If the run of an answer is gone, its options are unknown: then only changed bytes make it out of date.
    """
    suspect = rows[f"{stage.name}_suspect"].to_numpy()
    result: Mask = suspect == OTHER_BYTES
    at = np.flatnonzero(suspect == SUSPECT)
    if len(at):
        chosen = rows.take(pa.array(at))
        own = [signature_of(layout, run) for run in chosen[f"{stage.name}_by"].to_pylist()]
        is_known = np.array([known is not None for known in own], bool)
        differ = ~_are_same(chosen, stage, [known or signature for known in own])
        result[at] = (is_known & differ) | _was_other(chosen, stage)
    return result


def _are_same(rows: pa.Table, stage: Stage, signatures: Sequence[str]) -> Mask:
    """Whether the recorded hash equals the hash of the row's inputs now, taken with the signature given for the row."""
    name = stage.name
    previous = rows[f"{name}_previous"].to_pylist()
    is_old = rows[f"{name}_is_old"].to_pylist()
    groups: dict[tuple[str, bool], list[int]] = {}
    for row, key in enumerate(zip(signatures, is_old, strict=True)):
        groups.setdefault(key, []).append(row)
    same = np.zeros(rows.num_rows, bool)
    for (signature, old), at in groups.items():
        part = rows if len(at) == rows.num_rows else rows.take(pa.array(at))
        if old:
            values = _values(part, stage, _named(stage, ["sizes", "edit"]))
            now = inputs_hashes(signature, values, _format_asked(part, stage))
        else:
            now = inputs_now(part, stage, signature)
        same[at] = [previous[row] == value for row, value in zip(at, now.to_pylist(), strict=True)]
    return same


def _was_other(rows: pa.Table, stage: Stage) -> Mask:
    """For answers without a digest: whether the uid, or a member that the stage reads, is known to have changed."""
    name, found = stage.name, np.zeros(rows.num_rows, bool)
    was = rows[f"{name}_was"]
    for row in np.flatnonzero(was.is_valid().to_numpy()).tolist():
        then = was[row].as_py()
        found[row] = then["uid"] != rows["uid"][row].as_py()
        for member in source_members(stage):
            old, new = (place_of(side, member) for side in (then["members"], rows[f"{name}_members"][row].as_py()))
            if old is None or new is None:
                found[row] |= old is not new
                continue
            digest = (rows[f"{name}_digests"][row].as_py() or {}).get(member)
            found[row] |= (old["ext"], old["size"]) != (new["ext"], new["size"])
            found[row] |= None not in (digest, old["digest"]) and digest != old["digest"]
    return found


def signature_of(layout: Layout, run: str | None) -> str | None:
    """A run's `stages.signature.options_hash`; None if the run is gone or does not record it."""
    return None if run is None else _signature_in(RunFiles(layout, run).description)


@lru_cache(maxsize=4096)
def _signature_in(description: Path) -> str | None:
    try:
        signature = files.read_object(description).get("options_hash")
    except (FileNotFoundError, ShardError):
        return None
    return signature if isinstance(signature, str) else None
