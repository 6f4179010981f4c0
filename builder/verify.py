"""The proof: exactly the selected samples of a hybrid shard differ, and every other byte is the source's.

Reads both tars anew, header by header; believes neither the table's offsets nor the writer.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder import table, tar
from builder.edits import EditsReader
from builder.errors import BuilderError
from builder.layout import Layout
from builder.schema import IMAGE_EXTENSIONS
from builder.writer import Edit, ShardPlan, is_written

#: Bytes of one comparison.
_STEP = 4 << 20


@dataclass
class Proof:
    """What was found.

    Attributes:
        same: bytes of hybrid shards that are the source's.
        problems: what is wrong, one sentence each, the shard first.
    """

    shards: int = 0
    rows: int = 0
    edited: int = 0
    dropped: int = 0
    same: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)


class _Wrong(Exception):
    """The first thing that is wrong with a shard."""


def verify_shard(layout: Layout, plan: ShardPlan, proof: Proof) -> None:
    """Proves one hybrid shard against its source and its plan; what is wrong becomes a problem of the proof."""
    proof.shards += 1
    try:
        if table.is_behind(layout, plan.shard):
            raise _Wrong("its partition is behind its column files; fix: builder fold")
        if not layout.hybrid(plan.shard).exists():
            raise _Wrong("it has not been written; fix: builder write")
        _Pair(layout, plan, proof).prove()
        if not is_written(layout, plan):
            raise _Wrong("its manifest does not match the table; fix: builder write")
    except _Wrong as wrong:
        proof.problems.append(f"shard '{plan.shard}': {wrong}")
    except (BuilderError, OSError) as error:
        proof.problems.append(f"shard '{plan.shard}': {' '.join(str(error).split())}")


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


class _Pair:
    """A source shard beside its hybrid shard."""

    def __init__(self, layout: Layout, plan: ShardPlan, proof: Proof) -> None:
        self._layout, self._plan, self._proof = layout, plan, proof
        self._source_path = Path(plan.source.path)
        self._hybrid_path = layout.hybrid(plan.shard)

    def prove(self) -> None:
        self._source_index = tar.index(self._source_path)
        self._hybrid_index = tar.index(self._hybrid_path)
        row_of = self._rows_of_members()
        with (
            _mapped(self._source_path) as source,
            _mapped(self._hybrid_path) as hybrid,
            EditsReader(self._layout.root) as edits,
        ):
            self._source, self._hybrid, self._edits = source, hybrid, edits
            self._walk(row_of)
        self._proof.size += self._hybrid_index.file_size

    def _rows_of_members(self) -> list[int]:
        """The table's row of each member of the source, -1 for members that belong to no sample; the rows reconcile."""
        places, state = table.read_partition(self._layout, self._plan.shard, ["key", "source_members"])
        index = self._source_index
        members = places["source_members"].to_pylist()
        keys = places["key"].to_pylist()
        if table.rows_hash(keys, [[m["size"] for m in sample] for sample in members]) != state.rows:
            raise _Wrong("the table's keys and sizes are not those it was committed with")
        at = {int(header): i for i, header in enumerate(index.header)}
        row_of = [-1] * len(index)
        for row, (key, sample) in enumerate(zip(keys, members, strict=True)):
            for member in sample:
                i = at.get(member["header"], -1)
                name = f"{key}.{member['ext']}"
                if i < 0 or (index.names[i], int(index.data[i]), int(index.size[i])) != (
                    name,
                    member["data"],
                    member["size"],
                ):
                    raise _Wrong(f"row {row}: member '{name}' is not at byte {member['header']} of the source")
                row_of[i] = row
        kinds = index.kind.tolist()
        for i, row in enumerate(row_of):
            if row < 0 and kinds[i] in tar.REGULAR and tar.split_name(index.names[i]) is not None:
                raise _Wrong(f"member '{index.names[i]}' of the source is in no row of the table")
        self._proof.rows += len(keys)
        return row_of

    def _walk(self, row_of: list[int]) -> None:
        index, stop = self._source_index, self._source_index.stop.tolist()
        self._at = 0  # position in the hybrid shard
        begun = 0  # first byte of the source that is not compared yet
        next_member = 0  # of the hybrid
        done: set[int] = set()
        for i, row in enumerate(row_of):
            edit = self._plan.edits.get(row)
            if edit is None:
                next_member += 1
                continue
            start = int(index.header[i])
            self._same(begun, start)
            if row not in done:
                done.add(row)
                members = self._members_of(row_of, i)
                next_member = self._edited(edit, members, next_member)
            begun = stop[i]
        if self._plan.edits:
            self._same(begun, index.end)
            if self._hybrid_index.end != self._at:
                raise _Wrong(f"it holds members behind byte {self._at} that the source does not have")
        else:
            self._same(begun, index.file_size)
            if self._hybrid_index.file_size != self._at:
                raise _Wrong("it is longer than its source, though no sample of it is edited")

    def _members_of(self, row_of: list[int], first: int) -> list[int]:
        """Members of the row that begins at `first`; others may lie between them."""
        row, found = row_of[first], []
        for i in range(first, len(row_of)):
            if row_of[i] == row:
                found.append(i)
            elif row_of[i] >= 0:
                break
        return found

    def _same(self, start: int, stop: int) -> None:
        """Compares the source's bytes [start, stop) with the hybrid's next ones."""
        while start < stop:
            step = min(_STEP, stop - start)
            if self._source[start : start + step] != self._hybrid[self._at : self._at + step]:
                raise _Wrong(self._difference(start, step))
            start += step
            self._at += step
            self._proof.same += step

    def _difference(self, start: int, step: int) -> str:
        one, two = self._source[start : start + step], self._hybrid[self._at : self._at + step]
        first = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        index = self._source_index
        member = max(int(index.header.searchsorted(start + first, "right")) - 1, 0)
        name = index.names[member] if len(index) else ""
        return (
            f"byte {self._at + first} differs from byte {start + first} of the source, at member '{name}', which is "
            "not edited"
        )

    def _edited(self, edit: Edit, members: list[int], first: int) -> int:
        """Checks the records of an edited sample; returns the hybrid's next member."""
        names = [self._source_index.names[i] for i in members]
        parts = tar.split_name(names[0])
        assert parts is not None
        key = parts[0]
        label = f"row {edit.row} (key '{key}')"
        if edit.dropped:
            self._proof.dropped += 1
            return first
        index = self._hybrid_index
        found: dict[str, bytes] = {}
        order: list[str] = []
        i = first
        while i < len(index) and (here := tar.split_name(index.names[i])) is not None and here[0] == key:
            if int(index.header[i]) != self._at:
                break
            found[here[1]] = self._hybrid[int(index.data[i]) : int(index.data[i] + index.size[i])]
            order.append(here[1])
            self._at = int(index.stop[i])
            i += 1
        if not found:
            raise _Wrong(f"{label} should be edited and is not at byte {self._at}")
        sources = {name[len(key) + 1 :]: member for name, member in zip(names, members, strict=True)}
        self._check_sample(edit, label, found, sources)
        self._proof.edited += 1
        return i

    def _check_sample(self, edit: Edit, label: str, found: dict[str, bytes], sources: dict[str, int]) -> None:
        lower = {extension.lower(): extension for extension in found}
        image = next((lower[e] for e in IMAGE_EXTENSIONS if e in lower), None)
        fields = self._json(label, found.get(lower.get("json", "json")))
        if edit.caption is not None:
            text = found.get(lower.get("txt", "txt"))
            if text is None or text.decode("utf-8", "replace") != edit.caption:
                raise _Wrong(f"{label}: its txt is not the new caption")
            if fields.get("caption") != edit.caption:
                raise _Wrong(f"{label}: its json does not hold the new caption")
        for name, value in edit.fields.items():
            if fields.get(name) != value:
                raise _Wrong(f"{label}: its json field '{name}' is not the value that was set")
        changed = {"json", "txt"} if edit.caption is not None else {"json"}
        if edit.image is not None:
            changed |= set(IMAGE_EXTENSIONS)
            self._check_image(edit, label, found.get(image or ""), fields)
        for extension, member in sources.items():
            if extension.lower() in changed:
                continue
            start, size = int(self._source_index.data[member]), int(self._source_index.size[member])
            if found.get(extension) != self._source[start : start + size]:
                raise _Wrong(f"{label}: its member '{extension}' is not the source's")

    def _check_image(self, edit: Edit, label: str, picture: bytes | None, fields: dict[str, Any]) -> None:
        assert edit.image is not None
        if picture is None:
            raise _Wrong(f"{label}: it has no image")
        if hashlib.sha256(picture).hexdigest() != edit.made["image_sha256"]:
            raise _Wrong(f"{label}: its image is not the one that the table describes")
        if self._edits.read(*edit.image) != picture:
            raise _Wrong(f"{label}: edits tar '{edit.image[0]}' does not hold its image at byte {edit.image[1]}")
        wanted = {
            "width": edit.made["image_width"],
            "height": edit.made["image_height"],
            "sha256": edit.made["image_sha256"],
        }
        for name, value in wanted.items():
            if name not in edit.fields and fields.get(name) != value:
                raise _Wrong(f"{label}: its json field '{name}' does not describe the new image")
        if "face_bboxes" in fields and "face_bboxes" not in edit.fields:
            raise _Wrong(f"{label}: its json still has the old image's face_bboxes")

    def _json(self, label: str, raw: bytes | None) -> dict[str, Any]:
        try:
            value = json.loads(raw or b"")
        except ValueError:
            raise _Wrong(f"{label}: its json does not parse") from None
        if not isinstance(value, dict):
            raise _Wrong(f"{label}: its json is no object")
        return value


def summary(proof: Proof) -> Sequence[tuple[str, str]]:
    """The proof as names and values, for people."""
    return (
        ("shards proven", f"{proof.shards - len(proof.problems)} of {proof.shards}"),
        ("samples", f"{proof.rows}"),
        ("samples swapped", f"{proof.edited}"),
        ("samples dropped", f"{proof.dropped}"),
        ("bytes proven the source's", f"{proof.same:,} of {proof.size:,}"),
    )
