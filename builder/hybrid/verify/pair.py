"""A source shard and its hybrid shard: every byte of the hybrid one is the source's, or of an edited sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.hybrid.edit import Rules
from builder.hybrid.shard_plan import ShardPlan
from builder.hybrid.verify import side_files
from builder.hybrid.verify.change import Change, Changes
from builder.hybrid.verify.problem import INGEST, WRITE, Wrong, removing
from builder.hybrid.verify.proof import Proof
from builder.hybrid.verify.sample import ProvenSample, SampleProof
from builder.hybrid.verify.shard_bytes import indexed, opened_tar
from builder.store.layout import Layout
from builder.table import partitions
from builder.table.edits import EditsReader
from builder.tar import blocks, member_names
from builder.tar.index import Index

#: Bytes of one comparison.
_STEP = 4 << 20
#: Two blocks of zeros end an archive, and more fill it up to whole records of 20 blocks. Source: POSIX.1-2001 pax.
_END_MARK, _RECORD = 2 * 512, 20 * 512


class Pair:
    """A source shard and its hybrid shard.

    Args:
        plan: of the shard; only its source, its digest and its selected rows are used.
        proof: the result, to which this shard is added.
    """

    def __init__(self, layout: Layout, plan: ShardPlan, rules: Rules, proof: Proof) -> None:
        self._layout, self._plan, self._rules, self._proof = layout, plan, rules, proof
        self._source_path = Path(plan.source.path)
        self._hybrid_path = layout.hybrid(plan.shard)
        self._fix = removing(self._hybrid_path, WRITE)
        self._edited: dict[int, ProvenSample] = {}  # by row; a dropped sample has no members
        self._edited_count = self._dropped_count = self._same_count = 0

    def prove(self) -> int:
        """Proves the whole shard; returns how many samples the hybrid shard holds.

        Raises:
            Wrong: the first problem.
        """
        self._check_source()
        described = side_files.described(self._layout.manifest(self._plan.shard))
        if not self._hybrid_path.exists():
            raise Wrong("it has not been written", WRITE)
        if described is not None and described[0] != self._plan.digest:
            raise Wrong("it was written from another state of the table", WRITE)
        source_index = indexed(self._source_path, "its source", INGEST)
        hybrid_index = indexed(self._hybrid_path, "the hybrid shard", self._fix)
        self._read_rows(source_index)
        self._read_changes()
        with (
            opened_tar(self._source_path, source_index) as source,
            opened_tar(self._hybrid_path, hybrid_index) as hybrid,
            EditsReader(self._layout) as generated,
        ):
            self._source, self._hybrid = source, hybrid
            self._samples = SampleProof(source, hybrid, generated, self._fix)
            self._compare()
        self._proof.size += hybrid_index.file_size
        return self._check_side_files(described, hybrid_index)

    def _check_source(self) -> None:
        path, size = self._source_path, self._plan.source.size
        try:
            found = path.stat().st_size
        except OSError as error:
            raise Wrong(f"its source '{path}' cannot be read: {error.strerror}", INGEST) from error
        if found != size:
            raise Wrong(f"its source '{path}' has {found} bytes, but had {size} when it was ingested", INGEST)

    def _read_rows(self, index: Index) -> None:
        """Finds every member of every row of the table in the source, and every member of the source in a row."""
        places, _ = partitions.read_partition(self._layout, self._plan.shard, ["key", "source_members"])
        self._keys: list[str] = places["key"].to_pylist()
        self._places: list[list[dict[str, Any]]] = places["source_members"].to_pylist()
        at = {int(header): i for i, header in enumerate(index.header)}
        data, size = index.data.tolist(), index.size.tolist()
        self._row_of = [-1] * len(index)
        for row, (key, sample) in enumerate(zip(self._keys, self._places, strict=True)):
            for member in sample:
                i = at.get(member["header"], -1)
                name = f"{key}.{member['ext']}"
                if i < 0 or (index.names[i], data[i], size[i]) != (name, member["data"], member["size"]):
                    raise Wrong(f"row {row}: member '{name}' is not at byte {member['header']} of the source", INGEST)
                self._row_of[i] = row
        kinds = index.kind.tolist()
        for i, row in enumerate(self._row_of):
            if row < 0 and kinds[i] in blocks.REGULAR and member_names.belongs(index.names[i]) is not None:
                raise Wrong(f"member '{index.names[i]}' of the source is in no row of the table", INGEST)
        self._proof.rows += len(self._keys)

    def _read_changes(self) -> None:
        """Reads what changes in the samples that the write SQL returns, by row."""
        changes = Changes(self._layout, self._rules)
        self._changes: dict[int, Change] = {}
        for row in self._plan.selected:
            extensions = [place["ext"] for place in self._places[row["row"]]]
            change = changes.of(row, extensions)
            if change is not None:
                self._changes[change.row] = change

    def _is_dropped(self, row: int) -> bool:
        return row in self._changes and self._changes[row].is_dropped

    # --- every byte ---

    def _compare(self) -> None:
        index = self._source.index
        stop = index.stop.tolist()
        stays = [end for end, row in zip(stop, self._row_of, strict=True) if not self._is_dropped(row)]
        last = stays[-1] if stays else 0  # what follows the last member that stays is left out
        self._at = 0  # position in the hybrid shard
        begun = 0  # first byte of the source that is not compared yet
        done: set[int] = set()
        for i, row in enumerate(self._row_of):
            change = self._changes.get(row)
            if change is None:
                continue
            self._compare_same(begun, min(int(index.header[i]), last))
            if row not in done:
                done.add(row)
                self._compare_changed(change, self._members_of(i))
            begun = stop[i]
        is_copied = not self._changes and index.has_end_mark and index.end == last
        self._compare_same(begun, index.file_size if is_copied else last)
        self._check_end(0 if is_copied else _closing(self._at))

    def _check_end(self, closing: int) -> None:
        """Checks that exactly `closing` zeros follow."""
        found = self._hybrid.index
        if found.end > self._at:
            raise Wrong(f"{self._found_at(self._at)} is at byte {self._at}, after the source's last member", self._fix)
        if found.file_size != self._at + closing:
            raise Wrong(
                f"it should end at byte {self._at + closing}, with zeros from byte {found.end} on, but ends at byte "
                f"{found.file_size}",
                self._fix,
            )

    def _members_of(self, first: int) -> list[int]:
        """Members of the row that begins at `first`; others may lie between them."""
        row, found = self._row_of[first], []
        for i in range(first, len(self._row_of)):
            if self._row_of[i] == row:
                found.append(i)
            elif self._row_of[i] >= 0:
                break
        return found

    def _compare_same(self, start: int, stop: int) -> None:
        """Compares the source's bytes [start, stop) with the hybrid's next ones."""
        while start < stop:
            step = min(_STEP, stop - start)
            if self._source.read(start, start + step) != self._hybrid.read(self._at, self._at + step):
                raise Wrong(self._difference(start, step), self._fix)
            start += step
            self._at += step
            self._proof.same += step
            self._same_count += step

    def _difference(self, start: int, step: int) -> str:
        """The first difference in the next `step` bytes, in words."""
        one, two = self._source.read(start, start + step), self._hybrid.read(self._at, self._at + step)
        first = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        index, byte, at = self._source.index, start + first, self._at + first
        if byte >= index.end:
            return f"byte {at}, after the archive's end, should be zero but is not"
        member = _member_at(index, byte)
        name, row = f"member '{index.names[member]}'", self._row_of[member]
        label = f"row {row}: {name}" if row >= 0 else f"{name}, of no sample,"
        begins = self._at + int(index.header[member]) - start
        found = self._found_at(at)
        if found != name:
            return f"{label} of the source should be at byte {begins}, but {found} is there"
        return f"{label} is not edited, but byte {at} differs from byte {byte} of the source"

    def _found_at(self, at: int) -> str:
        """The hybrid's member whose record contains byte `at`."""
        index = self._hybrid.index
        return "the archive's end" if at >= index.end else f"member '{index.names[_member_at(index, at)]}'"

    def _compare_changed(self, change: Change, source: list[int]) -> None:
        """Checks the records of a sample that is edited or dropped."""
        key, index = self._keys[change.row], self._hybrid.index
        label = f"row {change.row} (key '{key}')"
        start = self._at
        found: list[tuple[str, int]] = []
        i = _member_at(index, self._at)
        while 0 <= i < len(index) and int(index.header[i]) == self._at:
            parts = member_names.split_name(index.names[i])
            if parts is None or parts[0] != key:
                break
            found.append((parts[1], i))
            self._at = int(index.stop[i])
            i += 1
        if change.is_dropped:
            if found:
                raise Wrong(f"{label} should be dropped, but is still at byte {start}", self._fix)
            self._edited[change.row] = ProvenSample([])
            self._dropped_count += 1
            self._proof.dropped += 1
            return
        if not found:
            there = self._found_at(start)
            raise Wrong(f"{label} should be edited, but is not at byte {start}: {there} is there", self._fix)
        self._edited[change.row] = self._samples.prove(change, key, found, source)
        self._edited_count += 1
        self._proof.edited += 1

    # --- files next to the shard ---

    def _check_side_files(self, described: tuple[str, dict[str, Any]] | None, hybrid: Index) -> int:
        """Checks manifest and statistics; returns how many samples the hybrid shard holds."""
        if described is None:
            raise Wrong("its manifest is gone", WRITE)
        rows, has_end_mark = len(self._keys), self._source.index.has_end_mark
        found = {
            "rows": rows, "edited": self._edited_count, "dropped": self._dropped_count, "size": hybrid.file_size,
            "copied": self._same_count, "source_end_mark": has_end_mark,
        }  # fmt: skip
        extensions = [[place["ext"] for place in sample] for sample in self._places]
        samples = list(zip(self._keys, extensions, strict=True))
        path = self._layout.manifest(self._plan.shard)
        side_files.check_manifest(path, described[1], found, self._plan.shard, samples, self._edited)
        counts = {"count": rows, "successes": rows - self._dropped_count, "edited": self._edited_count}
        if not has_end_mark:
            counts["source_end_mark"] = False
            self._proof.no_end_mark += 1
        side_files.check_statistics(self._layout.stats(self._plan.shard), counts, self._fix)
        return rows - self._dropped_count


def _closing(length: int) -> int:
    """How many zeros should follow the last record of an archive that ends at byte `length`."""
    records = (length + _END_MARK + _RECORD - 1) // _RECORD
    return records * _RECORD - length


def _member_at(index: Index, at: int) -> int:
    """The last member whose record begins at or before byte `at`."""
    return int(index.header.searchsorted(at, "right")) - 1
