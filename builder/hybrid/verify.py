"""The proof: exactly the selected samples of a hybrid shard differ, and every other byte is the source's.

Reads both tars anew, header by header; believes neither the table's offsets nor the writer. Changes nothing on disk:
what is wrong is said with what would mend it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from builder import formats, machine
from builder.errors import BuilderError, ShardError
from builder.formats import IMAGE_EXTENSIONS
from builder.hybrid.edit import Edit, Rules, edited_json, manifest_provenance
from builder.hybrid.manifest import read_description
from builder.hybrid.shard_plan import ShardPlan
from builder.machine import asked_again
from builder.sources import members
from builder.store import files
from builder.store.layout import Layout, names
from builder.table import edits, partitions
from builder.table.edits import EditsReader
from builder.tar import blocks, indexing, member_names, record_heads
from builder.tar.index import Index

#: Bytes of one comparison.
_STEP = 4 << 20
#: Characters of a value that a problem quotes.
_SHOWN = 70
_FOLD, _WRITE = "builder fold", "builder write"
_INGEST = f"{members.AGAIN}, then {_WRITE}"


@dataclass
class Proof:
    """What was found.

    Attributes:
        proven: shards in which nothing is wrong.
        same: bytes of hybrid shards that are the source's.
        no_end_mark: shards whose source was cut: it has no end mark.
        problems: what is wrong, one sentence each with its fix, the shard or the file first.
        unread: shards of which nothing is said, since the machine did not give their bytes, with the reason.
    """

    shards: int = 0
    proven: int = 0
    rows: int = 0
    edited: int = 0
    dropped: int = 0
    same: int = 0
    size: int = 0
    no_end_mark: int = 0
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, other: Proof) -> None:
        """Adds what was found in one shard."""
        for name in ("proven", "rows", "edited", "dropped", "same", "size", "no_end_mark"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class _Wrong(Exception):
    """The first thing that is wrong with a shard.

    Args:
        what: half a sentence.
        fix: what would mend it.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{' '.join(what.split())}; fix: {fix}")


def _removing(path: Path, then: str) -> str:
    return f"rm {shlex.quote(str(path))}, then {then}"


def _reason(error: Exception) -> str:
    """What an error says, on one line, with the row and without the fix."""
    if isinstance(error, BuilderError):
        return (f"row {error.where['row']}: " if "row" in error.where else "") + error.what
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())


class Prover:
    """Proves the hybrid shards of a root one by one; a problem of one hides those of no other.

    Args:
        shards: those to prove.
        rules: how samples are edited.
    """

    def __init__(self, layout: Layout, shards: Sequence[str], rules: Rules) -> None:
        self._layout, self._shards, self._rules = layout, shards, rules
        self._samples: dict[str, int] = {}
        self.proof = Proof(shards=len(shards))
        self.wrong: dict[str, str] = {}
        self._unread: dict[str, str] = {}

    @property
    def looked_at(self) -> int:
        """How many shards it is through with."""
        return self.proof.proven + len(self.wrong) + len(self._unread)

    def check_gone(self, shards: Sequence[str]) -> None:
        """Takes note of hybrid shards whose sources are gone: of these nothing can be proven."""
        for shard in shards:
            state = partitions.partition_state(self._layout, shard)
            if state is not None and self._layout.hybrid(shard).exists() and not Path(state.source.path).exists():
                self.proof.shards += 1
                self.wrong[shard] = str(_Wrong(f"its source '{state.source.path}' is gone", "put it back"))

    def readable(self) -> list[str]:
        """The shards whose partitions can be read; all that is wrong with partitions becomes a problem."""
        readable = []
        for shard in self._shards:
            with self._noting(shard):
                partition = asked_again(partial(_partition, self._layout, shard))
                readable.append(shard)
                asked_again(partial(_check_partition, self._layout, shard, partition))
        return readable

    def prove(self, plan: ShardPlan) -> None:
        """Proves one hybrid shard against its source and its plan."""
        if plan.shard in {**self.wrong, **self._unread}:
            return
        tries: list[Proof] = []

        def prove() -> int:
            tries.append(Proof())
            return _Pair(self._layout, plan, self._rules, tries[-1]).prove()

        with self._noting(plan.shard):
            self._samples[plan.shard] = asked_again(prove)
            self.proof.proven += 1
        self.proof.add(tries[-1])

    @contextmanager
    def _noting(self, shard: str) -> Iterator[None]:
        """Takes note of what is wrong with a shard; what the machine did not give is no difference."""
        try:
            yield
        except Exception as error:
            if machine.is_of_the_machine(error):
                self._unread[shard] = str(machine.told(error))
            elif isinstance(error, _Wrong):
                self.wrong[shard] = str(error)
            elif isinstance(error, BuilderError | OSError):
                self.wrong[shard] = str(_Wrong(_reason(error), _removing(self._layout.hybrid(shard), _WRITE)))
            else:
                raise

    def refuse(self, shard: str, error: BuilderError) -> None:
        """Takes note of a shard of which the table gives no plan."""
        if machine.is_of_the_machine(error):
            self._unread.setdefault(shard, str(error))
        else:
            self.wrong.setdefault(shard, str(_Wrong(_reason(error), error.fix)))

    def finish(self, table_shards: Iterable[str]) -> Proof:
        """Checks what lies beside the hybrid shards, and returns the proof.

        Args:
            table_shards: every shard of the table.
        """
        loose = list(self._check_folder({f"{shard}.tar" for shard in table_shards}))
        self.proof.proven -= len(self.wrong.keys() & self._samples.keys())
        self._unread = {shard: why for shard, why in self._unread.items() if shard not in self.wrong}
        assert self.looked_at == self.proof.shards
        self.proof.problems = [f"shard '{shard}': {text}" for shard, text in sorted(self.wrong.items())] + loose
        self.proof.unread = [f"shard '{shard}': {text}" for shard, text in sorted(self._unread.items())]
        return self.proof

    def _check_folder(self, known: set[str]) -> Iterator[str]:
        """Problems of files that are of no one shard; a shard that `sizes.json` has wrong becomes wrong itself."""
        there = [name for name in names(self._layout.shards) if name.endswith(".tar")]
        for name in there:
            if name not in known:
                path = self._layout.shards / name
                yield f"'{path}': it is of no shard of the table; fix: rm {shlex.quote(str(path))}"
        path = self._layout.sizes()
        try:
            sizes = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            if self._samples:
                yield f"'{path}': it is gone; fix: {_WRITE}"
            return
        except ValueError:
            sizes = None
        if not isinstance(sizes, dict):
            yield f"'{path}': it is not a json object; fix: {_WRITE}"
            return
        for name in sorted(sizes.keys() - set(there)):
            if name.removesuffix(".tar") not in self.wrong:
                yield f"'{path}': it names '{name}', which is not there; fix: {_WRITE}"
        for shard, count in self._samples.items():
            found = sizes.get(f"{shard}.tar")
            if found != count:
                told = "does not name it" if found is None else f"says {found!r} samples, and it has {count}"
                self.wrong[shard] = str(_Wrong(f"sizes.json {told}", _WRITE))


# --- the table ---


def _partition(layout: Layout, shard: str) -> pa.Table:
    path = layout.partition(shard)
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except FileNotFoundError:
        raise _Wrong("its partition is gone", _FOLD) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise _Wrong(f"its partition is damaged ({_reason(error)})", _removing(path, _FOLD)) from error


def _check_partition(layout: Layout, shard: str, partition: pa.Table) -> None:
    """Compares a partition with the column files that it was folded from."""
    try:
        wanted, _ = files.retry_listing(partial(partitions.folded, layout, shard))
    except ShardError as error:
        file = Path(error.where["file"])
        again = "builder run: the generation before it counts, or its work is done anew"
        raise _Wrong(f"{error.what}: '{file}'", _removing(file, again)) from error
    if partitions.is_behind(layout, shard):
        raise _Wrong("its partition is behind its column files", _FOLD)
    mend = _removing(layout.partition(shard), _FOLD)
    if partition.num_rows != wanted.num_rows:
        raise _Wrong(f"its partition has {partition.num_rows} rows, its column files have {wanted.num_rows}", mend)
    for name in (name for name in wanted.column_names if name in partition.column_names):
        row = _first_difference(partition[name], wanted[name])
        if row is not None:
            raise _Wrong(f"row {row}: column '{name}' of its partition is not what its column files say", mend)


def _first_difference(one: pa.ChunkedArray, other: pa.ChunkedArray) -> int | None:
    """The first row whose values differ; NaN is NaN."""
    if one.type != other.type or one.equals(other):
        return None  # another type: the partition is older than the column, and reads as nulls
    pairs = enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True))
    return next((row for row, (a, b) in pairs if repr(a) != repr(b)), None)


# --- the bytes ---


class _Bytes:
    """The bytes of a file by slices, read: a mapping kills the process with a page that the disk does not give."""

    def __init__(self, file: FileIO) -> None:
        self._descriptor = file.fileno()
        self._size = os.fstat(self._descriptor).st_size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        return files.read_at(self._descriptor, start, max(stop - start, 0))


@contextmanager
def _opened(path: Path) -> Iterator[_Bytes]:
    with path.open("rb", buffering=0) as file:
        yield _Bytes(file)


def _indexed(path: Path, whose: str, fix: str) -> Index:
    try:
        return indexing.index(path)
    except (BuilderError, OSError) as error:
        raise _Wrong(f"{whose}: {_reason(error)}", fix) from error


class _Pair:
    """A source shard beside its hybrid shard."""

    def __init__(self, layout: Layout, plan: ShardPlan, rules: Rules, proof: Proof) -> None:
        self._layout, self._plan, self._rules, self._proof = layout, plan, rules, proof
        self._source_path = Path(plan.source.path)
        self._hybrid_path = layout.hybrid(plan.shard)
        self._mend = _removing(self._hybrid_path, _WRITE)
        self._edits_members: dict[str, dict[int, int]] = {}
        self._written: dict[int, list[tuple[str, str]]] = {}  # by edited row: names and sha256 of its members
        self._provenance: dict[int, str] = {}  # by edited row without a json: what the manifest says of it
        self._edited_count = self._dropped_count = self._same_count = 0

    def prove(self) -> int:
        """Proves all of it; returns the samples that the hybrid shard holds."""
        self._check_source()
        described = self._description()
        if not self._hybrid_path.exists():
            raise _Wrong("it has not been written", _WRITE)
        if described is not None and described[0] != self._plan.digest:
            raise _Wrong("it was written from another state of the table", _WRITE)
        self._source_index = _indexed(self._source_path, "its source", _INGEST)
        self._hybrid_index = _indexed(self._hybrid_path, "the hybrid shard", self._mend)
        self._read_rows()
        with (
            _opened(self._source_path) as source,
            _opened(self._hybrid_path) as hybrid,
            EditsReader(self._layout.root) as reader,
        ):
            self._source, self._hybrid, self._edits = source, hybrid, reader
            self._walk()
        self._proof.size += self._hybrid_index.file_size
        self._check_manifest(described)
        samples = len(self._keys) - self._dropped_count
        counts = {"count": len(self._keys), "successes": samples, "edited": self._edited_count}
        if not self._source_index.has_end_mark:
            counts["source_end_mark"] = False
            self._proof.no_end_mark += 1
        self._check_statistics(counts)
        return samples

    def _check_source(self) -> None:
        path, size = self._source_path, self._plan.source.size
        try:
            found = path.stat().st_size
        except OSError as error:
            raise _Wrong(f"its source '{path}' cannot be read: {error.strerror}", _INGEST) from error
        if found != size:
            raise _Wrong(f"its source '{path}' has {found} bytes, and had {size} when it was ingested", _INGEST)

    def _description(self) -> tuple[str, dict[str, Any]] | None:
        """What the manifest says it describes, None if there is no manifest."""
        try:
            return read_description(self._layout.manifest(self._plan.shard))
        except FileNotFoundError:
            return None
        except pa.ArrowInvalid as error:
            raise _Wrong(f"its manifest is damaged ({_reason(error)})", _WRITE) from error

    def _read_rows(self) -> None:
        """Finds every member of every row of the table in the source; the rows reconcile with what was committed."""
        shard = self._plan.shard
        places, _ = partitions.read_partition(self._layout, shard, ["key", "source_members"])
        index = self._source_index
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
                    raise _Wrong(f"row {row}: member '{name}' is not at byte {member['header']} of the source", _INGEST)
                self._row_of[i] = row
        kinds = index.kind.tolist()
        for i, row in enumerate(self._row_of):
            if row < 0 and kinds[i] in blocks.REGULAR and member_names.belongs(index.names[i]) is not None:
                raise _Wrong(f"member '{index.names[i]}' of the source is in no row of the table", _INGEST)
        self._proof.rows += len(self._keys)

    def _walk(self) -> None:
        index, stop = self._source_index, self._source_index.stop.tolist()
        edits = self._plan.edits
        stays = [end for end, row in zip(stop, self._row_of, strict=True) if row not in edits or not edits[row].dropped]
        last = stays[-1] if stays else 0  # what follows the last member that stays is left out
        self._at = 0  # position in the hybrid shard
        begun = 0  # first byte of the source that is not compared yet
        done: set[int] = set()
        for i, row in enumerate(self._row_of):
            edit = self._plan.edits.get(row)
            if edit is None:
                continue
            self._same(begun, min(int(index.header[i]), last))
            if row not in done:
                done.add(row)
                self._edited(edit, self._members_of(i))
            begun = stop[i]
        is_copied = not edits and index.has_end_mark and index.end == last
        self._same(begun, index.file_size if is_copied else last)
        self._check_end(0 if is_copied else len(blocks.end_of_archive(self._at)))

    def _check_end(self, closing: int) -> None:
        """Checks that nothing but `closing` zeros follows."""
        found = self._hybrid_index
        if found.end > self._at:
            raise _Wrong(f"{self._found_at(self._at)} is at byte {self._at}, behind the source's last", self._mend)
        if found.file_size != self._at + closing:
            raise _Wrong(
                f"it should end at byte {self._at + closing}, zeros from byte {found.end} on, and ends at byte "
                f"{found.file_size}",
                self._mend,
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

    def _same(self, start: int, stop: int) -> None:
        """Compares the source's bytes [start, stop) with the hybrid's next ones."""
        while start < stop:
            step = min(_STEP, stop - start)
            if self._source[start : start + step] != self._hybrid[self._at : self._at + step]:
                raise _Wrong(self._difference(start, step), self._mend)
            start += step
            self._at += step
            self._proof.same += step
            self._same_count += step

    def _difference(self, start: int, step: int) -> str:
        one, two = self._source[start : start + step], self._hybrid[self._at : self._at + step]
        first = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        index, byte, at = self._source_index, start + first, self._at + first
        if byte >= index.end:
            return f"byte {at} should be a zero behind the archive's end, and is not"
        member = int(index.header.searchsorted(byte, "right")) - 1
        name, row = f"member '{index.names[member]}'", self._row_of[member]
        label = f"row {row}: {name}" if row >= 0 else f"{name}, of no sample,"
        begins = self._at + int(index.header[member]) - start
        if (found := self._found_at(at)) != name:
            return f"{label} of the source should be at byte {begins}, and there is {found}"
        return f"{label} is not edited, and byte {at} differs from byte {byte} of the source"

    def _found_at(self, at: int) -> str:
        """The hybrid's member whose record has byte `at`."""
        index = self._hybrid_index
        return "the archive's end" if at >= index.end else f"member '{index.names[self._member_at(at)]}'"

    def _member_at(self, at: int) -> int:
        return int(self._hybrid_index.header.searchsorted(at, "right")) - 1

    # --- an edited sample ---

    def _edited(self, edit: Edit, sources: list[int]) -> None:
        """Checks the records of an edited sample."""
        key, index = self._keys[edit.row], self._hybrid_index
        label = f"row {edit.row} (key '{key}')"
        start, found = self._at, []
        i = self._member_at(self._at)
        while 0 <= i < len(index) and int(index.header[i]) == self._at:
            parts = member_names.split_name(index.names[i])
            if parts is None or parts[0] != key:
                break
            found.append((parts[1], i))
            self._at = int(index.stop[i])
            i += 1
        if edit.dropped:
            if found:
                raise _Wrong(f"{label} should be dropped and is still at byte {start}", self._mend)
            self._written[edit.row] = []
            self._dropped_count += 1
            self._proof.dropped += 1
            return
        if not found:
            there = self._found_at(start)
            raise _Wrong(f"{label} should be edited and is not at byte {start}, where {there} is", self._mend)
        sources_by_extension = {self._source_index.names[i][len(key) + 1 :]: i for i in sources}
        wanted = _wanted(edit, sources_by_extension, self._rules)
        if [extension for extension, _ in found] != [extension for extension, _ in wanted]:
            have, should = (", ".join(extension for extension, _ in some) for some in (found, wanted))
            raise _Wrong(f"{label}: its members are {have}, and should be {should}", self._mend)
        bodies = {extension: self._body(i) for extension, i in found}
        self._check_sample(edit, label, bodies, sources_by_extension)
        for (extension, i), (_, source) in zip(found, wanted, strict=True):
            self._check_record(f"{label}: its member '{extension}'", i, source)
        hashes = [hashlib.sha256(body).hexdigest() for body in bodies.values()]
        self._written[edit.row] = [(index.names[i], digest) for (_, i), digest in zip(found, hashes, strict=True)]
        self._edited_count += 1
        self._proof.edited += 1

    def _body(self, i: int) -> bytes:
        start = int(self._hybrid_index.data[i])
        return self._hybrid[start : start + int(self._hybrid_index.size[i])]

    def _source_body(self, i: int) -> bytes:
        start = int(self._source_index.data[i])
        return self._source[start : start + int(self._source_index.size[i])]

    def _check_sample(self, edit: Edit, label: str, found: dict[str, bytes], sources: dict[str, int]) -> None:
        lower = {extension.lower(): body for extension, body in found.items()}
        old = {extension.lower(): i for extension, i in sources.items()}
        fields = self._json(label, lower["json"]) if "json" in lower else None
        if edit.caption is not None:
            if "txt" in lower and lower["txt"].decode("utf-8", "replace") != edit.caption:
                raise _Wrong(f"{label}: its txt is not the new caption", self._mend)
            if fields is not None and fields.get("caption") != edit.caption:
                raise _Wrong(f"{label}: its json does not hold the new caption", self._mend)
        changed = {"json"} | ({"txt"} if edit.caption is not None else set())
        if edit.image is not None:
            changed |= {_image(old)[0], _image(lower)[0]}
            self._check_image(edit, label, _image(lower)[1], _image(old)[1], fields)
        for extension, body in found.items():
            if extension.lower() not in changed and body != self._source_body(sources[extension]):
                raise _Wrong(f"{label}: its member '{extension}' is not the source's", self._mend)
        if fields is None:
            self._provenance[edit.row] = manifest_provenance(self._source_body(old["txt"]), edit)
            return
        raw, txt = (self._source_body(old[name]) if name in old else None for name in ("json", "txt"))
        self._check_json(edit, label, lower["json"], fields, edited_json(raw, edit, txt))

    def _check_image(self, edit: Edit, label: str, picture: bytes, source: int, fields: dict[str, Any] | None) -> None:
        assert edit.image is not None
        if picture == self._source_body(source):
            raise _Wrong(f"{label}: its image is still the source's", self._mend)
        if hashlib.sha256(picture).hexdigest() != edit.made["image_sha256"]:
            raise _Wrong(f"{label}: its image is not the one that the table describes", self._mend)
        self._check_edits(label, edit.image, picture)
        if fields is None:
            return
        wanted = {
            "width": edit.made["image_width"],
            "height": edit.made["image_height"],
            "sha256": edit.made["image_sha256"],
        }
        for name, value in wanted.items():
            if fields.get(name) != value:
                raise _Wrong(
                    f"{label}: its json field '{name}' is {_shown(fields.get(name))}, and the new image's is "
                    f"{_shown(value)}",
                    self._mend,
                )
        for name in self._rules.box_fields:
            if name in fields:
                raise _Wrong(f"{label}: its json still has the old image's {name}", self._mend)

    def _check_edits(self, label: str, place: tuple[str, int, int], picture: bytes) -> None:
        """Checks that the edits tar is whole and holds the image where the table says."""
        path, offset, size = place
        if path not in self._edits_members:
            whose = f"{label}: edits tar '{path}'"
            try:
                tar_path = self._edits.located(path)
            except (BuilderError, OSError) as error:
                raise _Wrong(f"{whose}: {_reason(error)}", edits.AGAIN) from error
            index = _indexed(tar_path, whose, edits.AGAIN)
            if not index.has_end_mark:
                raise _Wrong(f"{label}: edits tar '{path}' has no end mark", edits.AGAIN)
            self._edits_members[path] = dict(zip(index.data.tolist(), index.size.tolist(), strict=True))
        if self._edits_members[path].get(offset) != size or self._edits.read(path, offset, size) != picture:
            raise _Wrong(f"{label}: edits tar '{path}' does not hold its image at byte {offset}", edits.AGAIN)

    def _json(self, label: str, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw)
        except ValueError:
            raise _Wrong(f"{label}: its json does not parse", self._mend) from None
        if not isinstance(value, dict):
            raise _Wrong(f"{label}: its json is no object", self._mend)
        return value

    def _check_json(self, edit: Edit, label: str, raw: bytes, fields: dict[str, Any], wanted: bytes) -> None:
        """Checks every field against the source's json and the table's row, and then the text."""
        expected = json.loads(wanted)
        for name in [*expected, *fields]:
            found, value = (repr(some.get(name, "(none)")) for some in (fields, expected))
            if found != value:
                raise _Wrong(
                    f"{label}: its json field '{name}' is {_shown(fields.get(name))}, and should be "
                    f"{_shown(expected.get(name))}",
                    self._mend,
                )
        if raw != wanted:
            raise _Wrong(f"{label}: its json has the right fields in another text than the writer's", self._mend)

    def _check_record(self, label: str, i: int, source: int) -> None:
        """Checks what surrounds a member's bytes: prefixes and header of the record that it replaces, zeros behind."""
        index, old = self._hybrid_index, self._source_index
        head = self._hybrid[int(index.header[i]) : int(index.data[i])]
        was = self._source[int(old.header[source]) : int(old.data[source])]
        if head != record_heads.remake_record_head(was, index.names[i], int(index.size[i])):
            raise _Wrong(f"{label} has another header than the record that it replaces", self._mend)
        if any(self._hybrid[int(index.data[i] + index.size[i]) : int(index.stop[i])]):
            raise _Wrong(f"{label} is followed by bytes that are not zero", self._mend)

    # --- what lies beside the tar ---

    def _check_manifest(self, described: tuple[str, dict[str, Any]] | None) -> None:
        """Checks that the manifest names every member of the hybrid shard with the sha256 of the edited ones, and says
        how samples without a json were made."""
        path = self._layout.manifest(self._plan.shard)
        if described is None:
            raise _Wrong("its manifest is gone", _WRITE)
        mend = _removing(path, _WRITE)
        found = {
            "rows": len(self._keys), "edited": self._edited_count, "dropped": self._dropped_count,
            "size": self._hybrid_index.file_size, "copied": self._same_count,
            "source_end_mark": self._source_index.has_end_mark,
        }  # fmt: skip
        for name, value in found.items():
            if described[1].get(name, name == "source_end_mark") != value:  # a manifest of old does not tell the last
                raise _Wrong(f"its manifest says {name} = {described[1].get(name)}, and it has {value}", mend)
        try:
            with pq.ParquetFile(path) as file:
                names = ["shard", "row", "member", "sha256", "origin", "provenance"]
                rows = file.read([name for name in names if name in file.schema_arrow.names]).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise _Wrong(f"its manifest is damaged ({_reason(error)})", mend) from error
        wanted = list(self._manifest_rows())
        if len(rows) != len(wanted):
            raise _Wrong(f"its manifest has {len(rows)} rows, and it has {len(wanted)} members", mend)
        for number, (row, should) in enumerate(zip(rows, wanted, strict=True)):
            for name, value in should.items():
                if row.get(name) != value:
                    raise _Wrong(
                        f"its manifest's row {number}, of member '{should['member']}', says {name} = "
                        f"{_shown(row.get(name))}, and should say {_shown(value)}",
                        mend,
                    )

    def _manifest_rows(self) -> Iterator[dict[str, Any]]:
        for row, (key, places) in enumerate(zip(self._keys, self._places, strict=True)):
            sources: list[tuple[str, str | None]] = [(f"{key}.{place['ext']}", None) for place in places]
            origin = "edited" if row in self._written else "source"
            told = self._provenance.get(row)
            for name, digest in self._written.get(row, sources):
                yield {
                    "shard": self._plan.shard, "row": row, "member": name, "sha256": digest, "origin": origin,
                    "provenance": told,
                }  # fmt: skip
                told = None  # the first of a sample's members says it

    def _check_statistics(self, counts: dict[str, int]) -> None:
        path = self._layout.stats(self._plan.shard)
        try:
            found = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise _Wrong(f"'{path.name}' is gone", self._mend) from None
        except ValueError:
            raise _Wrong(f"'{path.name}' does not parse", self._mend) from None
        if found != counts:
            have, should = (json.dumps(some) for some in (found, counts))
            raise _Wrong(f"'{path.name}' says {have}, and it should say {should}", self._mend)


def _image(by_extension: dict[str, Any]) -> tuple[str, Any]:
    """A sample's picture: its extension and what stands there."""
    return next((name, by_extension[name]) for name in IMAGE_EXTENSIONS if name in by_extension)


def _wanted(edit: Edit, sources: dict[str, int], rules: Rules) -> list[tuple[str, int]]:
    """The extensions that an edited sample should have, in order, each with the source's member that it replaces."""
    own, image = _image({extension.lower(): i for extension, i in sources.items()})
    wanted: list[tuple[str, int]] = []
    for extension, i in sources.items():
        if edit.image is not None and i == image:
            is_kept = rules.image == "source" or own in ("jpg", "jpeg") or edit.kind == own
            wanted.append((extension if is_kept else "jpg", i))
        elif edit.image is None or rules.other_pictures == "keep" or not formats.pictures_of([extension]):
            wanted.append((extension, i))
    if rules.json and not any(extension.lower() == "json" for extension in sources):
        wanted.append(("json", image))
    return wanted


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def summary(proof: Proof) -> Sequence[tuple[str, str]]:
    """The proof as names and values, for people."""
    return (
        ("shards proven", f"{proof.proven} of {proof.shards}"),
        ("samples", f"{proof.rows}"),
        ("samples swapped", f"{proof.edited}"),
        ("samples dropped", f"{proof.dropped}"),
        ("bytes proven the source's", f"{proof.same:,} of {proof.size:,}"),
        *([("sources without end mark", f"{proof.no_end_mark}")] if proof.no_end_mark else []),
    )
