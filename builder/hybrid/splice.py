"""One hybrid shard: copies what is unchanged from the source, and splices the edited samples in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builder.errors import ShardError, where
from builder.hybrid.assembly import Assembly, Part, length
from builder.hybrid.edit import Edit, Member, edited_json, manifest_provenance
from builder.hybrid.image import read_image
from builder.hybrid.manifest import EditedMember, SourceMembers, Written, encoded, manifest_of
from builder.hybrid.output_folder import check_apart
from builder.hybrid.shard_plan import ShardPlan
from builder.sources.members import AGAIN
from builder.sources.tars.opening import opened
from builder.store import files
from builder.store.layout import Layout
from builder.table import partitions
from builder.table.edits import EditsReader
from builder.tar import blocks, indexing, record_heads
from builder.tar.index import Index

#: Bytes that are read at a time around an edited sample's headers: its json and txt lie next to each other.
_NEAR = 8192
#: Members of edited samples with more bytes than this are copied from the source in parts.
_LARGE = 1 << 20
#: How often a shard is written if its source's time of change, and nothing else, changes meanwhile.
_TRIES = 3


def write_shard(layout: Layout, plan: ShardPlan) -> Written:
    """Writes one hybrid shard under a temporary name and renames it; then its statistics, and its manifest last.

    The old manifest is deleted first: a kill in between leaves a shard without a manifest, which is written again, and
    never a shard with the manifest of another one. If two processes write the same shard, the one that finds the
    other's tar starts again.

    Raises:
        ShardError: the source or an edits tar cannot be read; the old output stays.
    """
    with where(shard=plan.shard):
        while True:
            written, manifest, temp = _spliced(layout, plan)
            files.remove(layout.manifest(plan.shard))
            inode = temp.stat().st_ino
            temp.replace(files.check_no_link(layout.hybrid(plan.shard)))
            files.sync_folder(layout.shards)
            files.write_atomic(layout.stats(plan.shard), json.dumps(written.statistics).encode())
            files.write_atomic(layout.manifest(plan.shard), manifest)
            if layout.hybrid(plan.shard).stat().st_ino == inode:
                return written


def _spliced(layout: Layout, plan: ShardPlan) -> tuple[Written, pa.Buffer, Path]:
    """Writes a hybrid shard durably under a temporary name; returns what it holds, its manifest and that name."""
    with opened(layout, plan.shard, plan.source) as source, EditsReader(layout) as generated:
        before = _identity(source)
        places, state = partitions.read_partition(layout, plan.shard, ["key", "source_members"])
        if state.source != plan.source:
            raise ShardError("the shard was ingested again while it was written", fix="run the same command again")
        check_apart(layout, [Path(plan.source.path)])
        made: list[_Splicer] = []

        def write(path: Path) -> None:
            was = before
            for _ in range(_TRIES):
                made.append(_Splicer(source, generated, plan, places))
                made[-1].write(path)
                now = _identity(source)
                if now == was:
                    return
                if now[:2] != was[:2]:
                    break
                was = now  # perhaps only a link or the mode has changed
            raise ShardError(
                "the source shard changed while it was copied",
                where={"file": plan.source.path},
                fix="run the same command again; if that does not help: builder ingest",
            )

        temp = files.write_temp(layout.hybrid(plan.shard), write)
        return made[-1].written, made[-1].manifest, temp


def _identity(descriptor: int) -> tuple[int, int, int]:
    """Size and times of a file. Its time of change, unlike its time of modification, cannot be set."""
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class _Members:
    """Where the members of one shard's rows lie in the source, as columns.

    Attributes:
        keys: one per row.
        first: index of each row's first member in the other columns; last, the end of the last row.
    """

    def __init__(self, places: pa.Table) -> None:
        self.keys: list[str] = places["key"].to_pylist()
        self.header: list[int]
        self.data: list[int]
        self.size: list[int]
        members = places["source_members"].combine_chunks()
        offsets, flat = members.offsets.to_numpy(), members.values
        self.first: list[int] = offsets.tolist()
        self.extension: list[str] = flat.field("ext").to_pylist()
        self.header, self.data, self.size = (flat.field(name).to_pylist() for name in ("header", "data", "size"))

    def of(self, row: int) -> list[dict[str, Any]]:
        """The members of one row, in the form of `source_members`."""
        return [
            {
                "ext": self.extension[i],
                "header": int(self.header[i]),
                "data": int(self.data[i]),
                "size": int(self.size[i]),
            }
            for i in range(self.first[row], self.first[row + 1])
        ]

    def end(self, row: int) -> int:
        """The first byte after the last record of one row."""
        own = slice(self.first[row], self.first[row + 1])
        return max(
            data + size + blocks.padding(size) for data, size in zip(self.data[own], self.size[own], strict=True)
        )


@dataclass(frozen=True)
class _Prepared:
    """One edited sample, ready to be written.

    Attributes:
        parts: header, content and padding of its members, in order.
        ranges: the bytes of the source that it replaces, ascending.
        members: the new members, for the manifest.
    """

    edit: Edit
    parts: list[Part]
    ranges: list[tuple[int, int]]
    members: list[EditedMember]


class _Splicer:
    """Writes one hybrid shard.

    Attributes:
        manifest: every member, as a parquet file; set by `write`.
    """

    def __init__(self, source: int, generated: EditsReader, plan: ShardPlan, places: pa.Table) -> None:
        self._source, self._generated, self._plan = source, generated, plan
        self._members = _Members(places)
        self._window = (0, b"")
        self.manifest: pa.Buffer
        self._made: list[EditedMember] = []
        self._stays, self._tail = self._ending()
        self.written = Written(rows=len(self._members.keys), source_end_mark=self._tail.has_end_mark)

    def write(self, path: Path) -> None:
        with path.open("wb", buffering=0) as file, Assembly(self._source, file.fileno()) as made:
            at = 0
            for row in sorted(self._plan.edits):
                prepared = self._prepare(self._plan.edits[row])
                self._copy(made, at, prepared.ranges[0][0])
                made.add(prepared.parts)
                at = prepared.ranges[0][1]
                for start, stop in prepared.ranges[1:]:
                    self._copy(made, at, start)  # members in between that belong to no sample
                    at = stop
                if prepared.edit.dropped:
                    self.written.dropped += 1
                else:
                    self.written.edited += 1
                self._made += prepared.members
            self._finish(made, at)
            self.written.size = made.size
            self.manifest = self._encoded(self._manifest())  # while the last parts are still being written

    def _prepare(self, edit: Edit) -> _Prepared:
        members = self._members.of(edit.row)
        parts: list[Part] = []
        made: list[EditedMember] = []
        if not edit.dropped:
            key = self._members.keys[edit.row]
            old = self._read(edit, members)
            provenance = self._provenance_without_json(edit, old)
            for member, body, digest in self._bodies(edit, old):
                name = f"{key}.{member.extension}"
                size = length(body)
                head = record_heads.remake_record_head(old[member.place][0], name, size)
                parts += (head, body, bytes(blocks.padding(size)))
                made.append(EditedMember(self._plan.shard, edit.row, name, digest or self._sha256(body), provenance))
                provenance = None  # only the first member of a sample has it
        ranges = sorted(
            (place["header"], place["data"] + place["size"] + blocks.padding(place["size"])) for place in members
        )
        return _Prepared(edit, parts, ranges, made)

    def _provenance_without_json(self, edit: Edit, old: dict[int, tuple[bytes, Part]]) -> str | None:
        """The provenance of a sample without a json, for the manifest; None if the sample has a json."""
        if any(member.holds == "json" for member in edit.members):
            return None
        txt = old[next(member.place for member in edit.members if member.holds == "txt")][1]
        assert isinstance(txt, bytes)
        return manifest_provenance(txt, edit)

    def _ending(self) -> tuple[int, Index]:
        """The first byte after the last member that is not dropped, and the source's members after the last such row.

        What follows that byte is left out: dropped samples, and global pax headers, which Python's tarfile cannot read
        if no member follows them.
        """
        edits = self._plan.edits
        dropped = {row for row, edit in edits.items() if edit.dropped}
        last = next((row for row in reversed(range(len(self._members.keys))) if row not in dropped), -1)
        start = 0 if last < 0 else self._members.end(last)
        # Usually only a few members or zeros are left to walk.
        tail = indexing.index_from(self._source, start, self._plan.source.size)
        gone = {place["header"] for row in dropped if row > last for place in self._members.of(row)}
        members = zip(tail.header.tolist(), tail.stop.tolist(), strict=True)
        return max([start, *(stop for header, stop in members if header not in gone)]), tail

    def _copy(self, made: Assembly, start: int, end: int) -> None:
        """Copies a range without edited samples, up to the last member that stays."""
        end = min(end, self._stays)
        made.copy(start, end)
        self.written.copied += max(end - start, 0)

    def _finish(self, made: Assembly, at: int) -> None:
        """Writes the rest: copies the source's end if nothing was edited, else writes a new one."""
        tail = self._tail
        if not self._plan.edits and tail.has_end_mark and tail.end == self._stays:
            self._stays = self._plan.source.size
            self._copy(made, at, self._stays)
            return
        self._copy(made, at, self._stays)
        made.add([blocks.end_of_archive(made.size)])
        made.flush()

    def _read(self, edit: Edit, members: list[dict[str, Any]]) -> dict[int, tuple[bytes, Part]]:
        """Header and content of the members of an edited sample, by position.

        The content of a large member is its range; that of a member that is replaced or left out is empty.
        """
        holds = {member.place: member.holds for member in edit.members if not member.is_added}
        old: dict[int, tuple[bytes, Part]] = {}
        for i, place in sorted(enumerate(members), key=lambda pair: int(pair[1]["header"])):
            start, size = place["data"], place["size"]
            head = self._near(place["header"], start - place["header"])
            content: Part = b""
            if holds.get(i, "image") != "image":
                is_large = size > _LARGE and holds[i] == "source"
                content = (start, start + size) if is_large else self._near(start, size)
            old[i] = head, content
        return old

    def _sha256(self, body: Part) -> str:
        if isinstance(body, bytes):
            return hashlib.sha256(body).hexdigest()
        digest = hashlib.sha256()
        for start in range(*body, _LARGE):
            digest.update(files.read_at(self._source, start, min(_LARGE, body[1] - start)))
        return digest.hexdigest()

    def _bodies(self, edit: Edit, old: dict[int, tuple[bytes, Part]]) -> Iterator[tuple[Member, Part, str]]:
        """Each member of an edited sample with its content, and its sha256; empty if not yet known."""
        for member in edit.members:
            digest = ""
            content = old[member.place][1]
            if member.holds == "image":
                content, digest = self._picture(edit)
            elif member.holds == "json":
                content = self._json(edit, old, member)
            elif member.holds == "txt":
                assert edit.caption is not None
                content = edit.caption.encode()
            yield member, content, digest

    def _json(self, edit: Edit, old: dict[int, tuple[bytes, Part]], member: Member) -> bytes:
        raw = None if member.is_added else self._whole(old[member.place][1])
        txt = next((self._whole(old[m.place][1]) for m in edit.members if m.extension.lower() == "txt"), None)
        try:
            return edited_json(raw, edit, txt)
        except (TypeError, ValueError) as error:  # it is not an object, or not json
            raise ShardError(
                f"the json of an edited sample differs from what was ingested: {error}",
                where={"row": edit.row},
                fix=AGAIN,
            ) from error

    def _whole(self, content: Part) -> bytes:
        return content if isinstance(content, bytes) else files.read_at(self._source, content[0], length(content))

    def _picture(self, edit: Edit) -> tuple[bytes, str]:
        """The new image and its sha256, checked against the table."""
        assert edit.image is not None
        return read_image(self._generated, edit.image, edit.made["image_sha256"], edit.kind, edit.row)

    def _near(self, start: int, size: int) -> bytes:
        """Bytes of the source, from those that were read last if they contain them."""
        at = start - self._window[0]
        if at < 0 or at + size > len(self._window[1]):
            length = max(size, min(_NEAR, self._plan.source.size - start))
            self._window = (start, files.read_at(self._source, start, length))
            at = 0
        return self._window[1][at : at + size]

    def _manifest(self) -> pa.Table:
        """Every member of the hybrid shard."""
        members = self._members
        counts = np.diff(members.first)
        row_of = np.repeat(np.arange(len(counts)), counts)
        kept = ~np.isin(row_of, list(self._plan.edits))
        keys = pa.array(members.keys, pa.string()).take(pa.array(row_of[kept]))
        extensions = pa.array(members.extension, pa.string()).filter(pa.array(kept))
        names = pc.binary_join_element_wise(keys, extensions, ".")
        return manifest_of(SourceMembers(self._plan.shard, row_of[kept], names), self._made)

    def _encoded(self, manifest: pa.Table) -> pa.Buffer:
        return encoded(manifest, self._plan.digest, self.written, self._plan.on_disk)
