"""Groups the members of a tar into samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from builder.formats import IMAGE_EXTENSIONS
from builder.progress import shortened
from builder.sources.base import Seen
from builder.sources.tars.json_values import TYPE_NAMES, dumped
from builder.tar import blocks, member_names
from builder.tar.index import Index

#: Characters of a sample's error: a name may have a million, and a sample may have a million members.
MAX_ERROR = 1000
_SORT = "sort the shard: tar --sort=name"
_LINKS = frozenset(b"12S")


@dataclass
class Remarks:
    """Problems of the samples of a shard, by row.

    Attributes:
        problems: `class: message` of samples that cannot be used; only the first of each sample.
        notes: missing members, and values that read as null.
    """

    problems: dict[int, str] = field(default_factory=dict)
    notes: dict[int, list[str]] = field(default_factory=dict)

    def fail(self, row: int, kind: str, message: str) -> None:
        self.problems.setdefault(row, f"{kind}: {message}"[:MAX_ERROR])

    def note(self, row: int, message: str) -> None:
        known = self.notes.setdefault(row, [])
        if message not in known:
            known.append(message)


@dataclass
class ShardSamples:
    """The samples of one shard in tar order; `members` and `extensions` list their members one after another.

    Attributes:
        first: int64 (n + 1), where in `members` each sample begins, and the end of the last.
        members: int64, positions in the index.
        extensions: the extension of each member, as in the archive.
        json, txt: int64 (n), the position of that member in the index; -1 if a sample lacks it.
        of_macos: how many members were added by macOS; they belong to no sample.
        seen: which json fields the samples have.
    """

    keys: list[str]
    first: np.ndarray
    members: np.ndarray
    extensions: list[str]
    json: np.ndarray
    txt: np.ndarray
    remarks: Remarks
    of_macos: int = 0
    seen: Seen = field(default_factory=Seen)

    def __len__(self) -> int:
        return len(self.keys)

    def sizes(self, index: Index) -> list[list[int]]:
        """The member sizes of every sample."""
        sizes = index.size[self.members]
        counts = np.diff(self.first)
        if len(counts) and (counts == counts[0]).all():
            alike: list[list[int]] = sizes.reshape(-1, counts[0]).tolist()
            return alike
        return [part.tolist() for part in np.split(sizes, self.first[1:-1])] if len(counts) else []


# --- which members belong together ---


def group(index: Index) -> ShardSamples:
    """Members next to each other with the same key are a sample; members in between that belong to no sample are
    skipped."""
    samples = _alike(index) or _grouped(index)
    if len(samples) and not index.has_end_mark:
        why = "the shard has no end mark: it was cut behind this sample, and what followed is lost"
        other = samples.remarks.problems.pop(len(samples) - 1, None)
        samples.remarks.fail(len(samples) - 1, "NoEndMark", f"{why}; {other}" if other else why)
    return samples


def _alike(index: Index) -> ShardSamples | None:
    """The samples of a regular shard: each has the same members as the first, with picture, json and txt.

    None for any other shard. This is the fast way.
    """
    first = next(iter(index.names), "")
    parts = member_names.split_name(first)
    if parts is None or index.bad_names or not np.isin(index.kind, list(blocks.REGULAR)).all():
        return None
    key, _ = parts
    extensions = [name[len(key) + 1 :] for name in _while_prefix(index.names, key + ".")]
    period = len(extensions)
    lower = [extension.lower() for extension in extensions]
    has_all = {"json", "txt"} < set(lower) and set(IMAGE_EXTENSIONS) & set(lower)
    if not has_all or len(set(lower)) < period or len(index) % period:
        return None
    keys = [name[: -len(extensions[0]) - 1] for name in index.names[::period]]
    joined = "\n" + "\n".join(keys) + "\n"
    if (
        "." in joined
        or "\n__" in joined
        or "__MACOSX/" in joined
        or "/\n" in joined
        or "\n\n" in joined
        or len(set(keys)) < len(keys)
    ):
        return None
    for place, extension in enumerate(extensions):
        if [f"{key}.{extension}" for key in keys] != index.names[place::period]:
            return None
    members = np.arange(len(index))
    return ShardSamples(
        keys=keys,
        first=np.arange(0, len(index) + 1, period),
        members=members,
        extensions=extensions * len(keys),
        json=members[lower.index("json") :: period],
        txt=members[lower.index("txt") :: period],
        remarks=Remarks(),
    )


def _while_prefix(names: Sequence[str], prefix: str) -> Iterator[str]:
    for name in names:
        if not name.startswith(prefix):
            return
        yield name


def _grouped(index: Index) -> ShardSamples:
    """The samples of any shard, member by member."""
    keys: list[str] = []
    first: list[int] = []
    members: list[int] = []
    extensions: list[str] = []
    rows: dict[str, int] = {}
    of_macos = 0
    remarks = Remarks()
    of_row: list[dict[str, int]] = []  # regular members by lower-case extension
    seen: set[str] = set()
    for i, (name, kind) in enumerate(zip(index.names, index.kind.tolist(), strict=True)):
        if kind not in blocks.REGULAR and kind not in _LINKS:
            continue
        parts = member_names.belongs(name)
        if parts is None:
            of_macos += member_names.is_of_macos(name)
            continue
        key, extension = parts
        at = int(index.header[i])
        if not keys or key != keys[-1]:
            if key in rows:
                before = int(index.header[members[first[rows[key]]]])
                remarks.fail(rows[key], "ScatteredSample", f"its key comes back at byte {at}; {_SORT}")
                remarks.fail(len(keys), "ScatteredSample", f"its key was there before, at byte {before}; {_SORT}")
            rows.setdefault(key, len(keys))
            keys.append(key)
            first.append(len(members))
            of_row.append({})
            seen = set()
        row = len(keys) - 1
        lower = extension.lower()
        if lower in seen:
            remarks.fail(row, "DuplicateMember", f"a second member with extension '{lower}' at byte {at}")
        seen.add(lower)
        if kind in blocks.REGULAR:
            of_row[row][lower] = i
        else:
            remarks.fail(row, "LinkMember", f"member '{name}' is {blocks.KINDS[kind]}, not a plain file")
        if i in index.bad_names:
            remarks.fail(row, "BadName", f"member '{name}' has a name that is not UTF-8")
        members.append(i)
        extensions.append(extension)
    starts = np.array([*first, len(members)], np.int64)
    _remark_missing(starts, extensions, remarks)
    return ShardSamples(
        keys=keys,
        first=starts,
        members=np.array(members, np.int64),
        extensions=extensions,
        json=np.array([found.get("json", -1) for found in of_row], np.int64),
        txt=np.array([found.get("txt", -1) for found in of_row], np.int64),
        remarks=remarks,
        of_macos=of_macos,
    )


def _remark_missing(first: np.ndarray, extensions: Sequence[str], remarks: Remarks) -> None:
    bounds = first.tolist()
    for row, (start, stop) in enumerate(pairwise(bounds)):
        own = [extension.lower() for extension in extensions[start:stop]]
        if not any(extension in IMAGE_EXTENSIONS for extension in own):
            remarks.fail(row, "MissingImage", f"no jpg, jpeg, png or webp among: {', '.join(own)}")
        for extension in ("json", "txt"):
            if extension not in own:
                remarks.note(row, f"no {extension}")


def shown_value(value: Any) -> str:
    return shortened(dumped(value) or TYPE_NAMES[type(value)], 40)
