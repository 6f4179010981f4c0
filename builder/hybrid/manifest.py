"""The manifest of a hybrid shard: its columns, and the contents of its footer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from builder.table import column_files, partitions

#: Part of the digest in every manifest: raising it rewrites every shard. A rule that changes the bytes of only some
#: samples is part of their digest instead (`shard_plan`).
VERSION = "3"
#: Keys in the footer: the digest of the plan; what the shard holds, with size and time of its source.
_DIGEST = b"builder.digest"
_INFO = b"builder.output"


@dataclass(frozen=True)
class SourceMembers:
    """The unchanged members of a hybrid shard, as columns.

    Attributes:
        rows: int64, one per member.
        names: text, one per member.
    """

    shard: str
    rows: np.ndarray
    names: pa.Array


@dataclass(frozen=True)
class EditedMember:
    """One member of an edited sample.

    Attributes:
        provenance: how its sample was made, as json on one line; only for the first member of a sample without a json.
    """

    shard: str
    row: int
    name: str
    sha256: str
    provenance: str | None = None


@dataclass(frozen=True)
class _ManifestColumn:
    """One column of a manifest.

    Attributes:
        of_source: its values for members of the source, or one value for all of them.
        of_edited: its value for a member of an edited sample.
    """

    name: str
    type: pa.DataType
    of_source: Callable[[SourceMembers], Any]
    of_edited: Callable[[EditedMember], Any]


#: Every column. `verify/side_files.py` reads them by its own code.
_COLUMNS = (
    _ManifestColumn("shard", pa.string(), lambda source: source.shard, lambda member: member.shard),
    _ManifestColumn("row", pa.int64(), lambda source: source.rows, lambda member: member.row),
    _ManifestColumn("member", pa.string(), lambda source: source.names, lambda member: member.name),
    _ManifestColumn("sha256", pa.string(), lambda source: None, lambda member: member.sha256),
    _ManifestColumn("origin", pa.string(), lambda source: "source", lambda member: "edited"),
    _ManifestColumn("provenance", pa.string(), lambda source: None, lambda member: member.provenance),
)


def manifest_of(source: SourceMembers, edited: Sequence[EditedMember]) -> pa.Table:
    """Every member of a hybrid shard, by row; members of one row in their order."""
    found = {}
    for column in _COLUMNS:
        values = column.of_source(source)
        if values is None or isinstance(values, str):
            values = pa.repeat(pa.scalar(values, column.type), len(source.rows))
        new = pa.array([column.of_edited(member) for member in edited], column.type)
        found[column.name] = pa.concat_arrays([pa.array(values, column.type), new])
    by_row = np.argsort(found["row"].to_numpy(), kind="stable")
    return pa.table(found).take(pa.array(by_row))


def encoded(manifest: pa.Table, digest: str, written: Written, source: tuple[int, int]) -> pa.Buffer:
    """A manifest as a parquet file.

    Args:
        digest: the plan's.
        source: size and time of modification (ns) of the source.
    """
    info = json.dumps({**vars(written), "source": source}).encode()
    sink = pa.BufferOutputStream()
    column_files.write_parquet(manifest, {_DIGEST: digest.encode(), _INFO: info}, sink)
    return sink.getvalue()


@dataclass
class Written:
    """What one hybrid shard holds.

    Attributes:
        rows: samples of the source shard.
        edited: samples that differ, without dropped ones.
        size: bytes of the tar.
        copied: how many of them were copied from the source.
        source_end_mark: whether zeros close the source; they always close a hybrid shard.
    """

    rows: int = 0
    edited: int = 0
    dropped: int = 0
    size: int = 0
    copied: int = 0
    source_end_mark: bool = True

    @property
    def statistics(self) -> dict[str, int | bool]:
        """The contents of `_stats.json`."""
        counts: dict[str, int | bool] = {
            "count": self.rows, "successes": self.rows - self.dropped, "edited": self.edited
        }  # fmt: skip
        return counts if self.source_end_mark else {**counts, "source_end_mark": False}


def read_description(manifest: Path) -> tuple[str, dict[str, Any]]:
    """The digest of the plan of a hybrid shard, and what the shard holds, from its manifest.

    Raises:
        FileNotFoundError: it does not exist.
        pyarrow.ArrowInvalid: it is damaged, or not a manifest.
    """
    with manifest.open("rb") as file:
        metadata = partitions.footer_values(file, (_DIGEST, _INFO))
    try:
        info = json.loads((metadata or {})[_INFO])
        if not {"source", "size"} <= info.keys():
            raise ValueError
        return (metadata or {})[_DIGEST].decode(), info
    except (KeyError, ValueError, AttributeError) as error:
        raise pa.ArrowInvalid("it does not describe a hybrid shard") from error
