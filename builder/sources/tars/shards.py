"""Tar shards into the table: find them, index each once, make their rows, commit.

Owns which files are a pipeline's shards, and what ingest commits of one.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from builder import machine
from builder.errors import ConfigError, SchemaError, ShardError
from builder.sources.tars.changes import digests, follow
from builder.sources.tars.expected import expected
from builder.sources.tars.samples import Samples, Seen, columns_of, group, no_collection
from builder.store import files, globs
from builder.store.layout import Layout, local, shard_name, shard_name_fault
from builder.table import schema
from builder.table.column_files import SourceShard, read_column_file
from builder.table.commits import commit_source
from builder.table.inputs_hash import inputs_hashes
from builder.table.partitions import partition_state
from builder.table.schema import SOURCE, Column
from builder.tar import indexing
from builder.tar.index import Index

#: Raised when a column of `source` changes its meaning.
VERSION = "2"
#: What each raised version changed, the oldest first: `builder plan` tells it of shards that an older one has read.
CHANGES: dict[str, str] = {
    "2": "the last sample of a shard without end mark has failed (NoEndMark): the shard was cut there; members that "
    "macOS puts beside files (._NAME, .DS_Store, __MACOSX/) belong to no sample; boxes up to 1 % of a side outside the "
    "picture are cut instead of unknown; numbers in "
    "fields of text have the digits that the json has",
}
#: The json field of face boxes where a pipeline names none.
BOXES = "face_bboxes"
#: What begins a note, at a shard's last sample, about the shard as a whole.
OF_SHARD = "the shard: "


# --- which shards ---


@dataclass(frozen=True)
class Found:
    """The shards that a pipeline names.

    Attributes:
        paths: by shard name, in the order of the patterns, sorted within each.
        missing: paths that a pattern names or matches and that are no files: they do not exist, are links to nothing,
            or are folders; a wildcard that matches nothing stands for itself.
    """

    paths: dict[str, Path]
    missing: list[Path]


def find(patterns: Sequence[str]) -> Found:
    """Expands `~`, braces and globs, relative to the working directory.

    Raises:
        ConfigError: nothing matches, a pattern names no files of this machine, or two files would be one shard.
    """
    paths: dict[str, Path] = {}
    missing: dict[str, None] = {}
    folders = _Folders()
    for pattern in patterns:
        for name in expand_braces(_here(pattern)):
            matches, others = folders.matches(name)
            missing |= dict.fromkeys(others if matches or others else [name])
            for match in matches:
                _add(paths, Path(match))
    if not paths:
        raise ConfigError("no shard matches dataset.shards", where=_looked_at(patterns, missing), fix=_near(patterns))
    return Found(paths, [Path(name) for name in missing])


def _here(pattern: str) -> str:
    """A pattern with `~` expanded; one that names no files of this machine is refused."""
    if "::" in pattern and not os.path.lexists(pattern):
        parts = [part for part in pattern.split("::") if part]
        raise ConfigError(
            f"dataset.shards '{pattern}' holds '::', which is not known here",
            fix=f"write a list: shards = {json.dumps(parts)}",
        )
    try:
        return local(pattern)
    except ConfigError as error:
        if os.path.lexists(pattern):
            return pattern
        raise ConfigError(f"dataset.shards: {error.what}", where=error.where, fix=error.fix) from None


class _Folders:
    """Which files exist: each folder is listed once, since 43,000 questions for one name each take seconds."""

    def __init__(self) -> None:
        self._files: dict[str, set[str]] = {}

    def matches(self, name: str) -> tuple[list[str], list[str]]:
        """The file of that very name, or the files that it matches as a glob, sorted; and what else it matches that
        should have been one: links to nothing, folders whose names end in `.tar`."""
        if self._is_file(name):
            return [name], []
        if not glob.has_magic(name):
            return [], []
        found = globs.matching(name, recursive=True)
        files = [match for match in found if self._is_file(match)]
        others = [match for match in found if not self._is_file(match)] if len(files) < len(found) else []
        return files, [match for match in others if match.endswith(".tar") or not os.path.isdir(match)]  # noqa: PTH112

    def _is_file(self, name: str) -> bool:
        folder, slash, base = name.rpartition("/")
        if folder + slash not in self._files:
            self._files[folder + slash] = _files_in(folder + slash or ".")
        return base in self._files[folder + slash]


def _files_in(folder: str) -> set[str]:
    """Names of files in a folder, links to files too; none if it may not be listed.

    Raises:
        OSError: the machine does not list it: a shard that is not seen would count as gone.
    """

    def listed() -> set[str]:
        found = set()
        with os.scandir(folder) as entries:
            for entry in entries:
                with _unless_of_the_machine():
                    if entry.is_file():
                        found.add(entry.name)
        return found

    with _unless_of_the_machine():
        return machine.asked_again(listed)
    return set()


@contextlib.contextmanager
def _unless_of_the_machine() -> Iterator[None]:
    """Passes over answers of the system that are of the file or folder asked for."""
    try:
        yield
    except OSError as error:
        if machine.is_of_the_machine(error):
            raise


def why_missing(path: Path) -> str:
    """Why a path of `Found.missing` is no shard."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return "a link to nothing"
        return "matches nothing" if glob.has_magic(str(path)) else "does not exist"
    except OSError as error:
        return str(error.strerror)
    return f"a folder; did you mean {path}/*.tar?" if stat.S_ISDIR(mode) else "no regular file"


def _add(paths: dict[str, Path], path: Path) -> None:
    shard = shard_name(path)
    other = paths.setdefault(shard, path)
    if other != path and other.resolve() != path.resolve():
        raise ConfigError(
            f"two shards are named '{shard}': a shard's name locates its samples",
            where={"one": other, "other": path},
            fix="rename one of them, or give each folder a dataset.root of its own",
        )


def _looked_at(patterns: Sequence[str], missing: Iterable[str]) -> dict[str, Any]:
    names = {name.rpartition("/")[0] or "." for pattern in patterns for name in expand_braces(_here(pattern))}
    folders = sorted(str(Path(name)) for name in names)
    return {
        "pattern": ", ".join(patterns),
        "folder": ", ".join(
            f"{name} ({'exists' if Path(name).is_dir() else 'does not exist'})" for name in folders[:3]
        ),
        "working directory": Path.cwd(),
        **{name: why_missing(Path(name)) for name in filter(os.path.lexists, itertools.islice(missing, 3))},
    }


def _near(patterns: Sequence[str]) -> str:
    first = Path(next(iter(expand_braces(_here(patterns[0])))) if patterns else ".")
    if patterns and first.is_dir():
        return f"'{patterns[0]}' is a folder; did you mean '{patterns[0].rstrip('/')}/*.tar'?"
    folder = first.parent
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if tars:
        return f"that folder has {len(tars)} tars, {tars[0].name} to {tars[-1].name}: set dataset.shards to fit them"
    return 'set dataset.shards to your tars, for example: --set dataset.shards="data/*.tar"'


def expand_braces(pattern: str) -> Iterator[str]:
    """`{000..335}`, `{0..8..2}`, `{a..c}` and `{a,b}`, as a shell and webdataset do; numbers keep their zeros."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        choices = _choices(match[1])
        if choices is not None:
            for choice in choices:
                yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
            return
    yield pattern


def _choices(inner: str) -> Iterable[str] | None:
    """What stands between two braces, expanded; None if a shell leaves it alone."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.([1-9]\d*))?", inner)
    if numbers:
        texts = numbers[1], numbers[2]
        is_padded = any(len(text) > 1 and text[0] == "0" for text in texts)
        width = max(map(len, texts)) if is_padded else 0
        return (f"{i:0{width}d}" for i in _between(int(numbers[1]), int(numbers[2]), int(numbers[3] or 1)))
    letters = re.fullmatch(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])", inner)
    if letters:
        first, last = (text for text in letters.groups() if text)
        return map(chr, _between(ord(first), ord(last), 1))
    return inner.split(",") if "," in inner else None


def _between(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


# --- what is in the table ---


@dataclass(frozen=True)
class Reading:
    """What ingest carries into the table.

    Attributes:
        fields: json fields with their types.
        boxes: the json field that holds precomputed face boxes.
        named: names of columns by json field, where they are not the usual ones.
    """

    fields: dict[str, pa.DataType]
    boxes: str = BOXES
    named: dict[str, str] = field(default_factory=dict)

    @property
    def carried(self) -> tuple[Column, ...]:
        """The columns of the json fields."""
        return schema.field_columns(self.fields, self.named)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (*schema.IDENTITY, *self.carried, *schema.status_columns(SOURCE))

    @property
    def signature(self) -> str:
        kinds: dict[str, str | list[str]] = {}
        for column in sorted(self.carried, key=lambda column: column.field):
            kind = schema.type_text(column.type)
            kinds[column.field] = kind if schema.field_of(column.name) == column.field else [kind, column.name]
        return hashlib.blake2b(json.dumps(["1", kinds, self.boxes]).encode(), digest_size=8).hexdigest()

    def beside(self, columns: Iterable[Column]) -> Reading:
        """This reading with the json fields that a root carries already: none of them leaves by another pipeline.

        Raises:
            SchemaError: the root has one of the fields in another column, or two columns that differ in case alone.
        """
        schema.merge(tuple(columns), ())
        fields, named = schema.carried_fields(columns)
        have = {column.field: column.name for column in schema.field_columns(fields, named)}
        for column in self.carried:
            if (old := have.get(column.field, column.name)) != column.name:
                as_it_is = f", or {schema.carried_as(column.field, column.type, old)}"
                raise SchemaError(
                    f"the root has the json's field '{column.field}' in the column '{old}', not in '{column.name}'",
                    fix=f"builder drop {shlex.quote(old)}{as_it_is if schema.plain_name(old) == old else ''}",
                )
        return Reading({**fields, **self.fields}, self.boxes, {**named, **self.named})

    def to_json(self) -> dict[str, Any]:
        fields = {name: schema.type_text(kind) for name, kind in self.fields.items()}
        return {"fields": fields, "boxes": self.boxes, "named": self.named}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reading:
        fields = {name: schema.parse_type(kind) for name, kind in data["fields"].items()}
        return cls(fields, data["boxes"], data["named"])


def identify(path: Path, reading: Reading) -> SourceShard:
    """What a shard is on disk now."""
    found = path.stat()
    return SourceShard(_real(path), found.st_size, found.st_mtime_ns, reading.signature, VERSION)


def _real(path: Path) -> str:
    """The absolute path without links; a folder is looked up once, and there are tens of thousands of files in it."""
    return os.path.realpath(path) if path.is_symlink() else f"{_real_folder(path.parent.absolute())}/{path.name}"


@lru_cache(maxsize=256)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder).rstrip("/")


def ingested(layout: Layout, path: Path) -> SourceShard | None:
    """What a shard was when the table's rows of it were read; None if it has none."""
    state = None if shard_name_fault(path) else partition_state(layout, shard_name(path))
    return None if state is None else state.source


# --- one shard ---


@dataclass
class Ingested:
    """What ingest did with one shard.

    Attributes:
        of_macos: members that macOS has put beside files.
        remarks: what is strange about the shard as a whole, a sentence each.
        seen: which json fields there are.
        changed: samples that are not as an earlier ingest had read them.
    """

    rows: int
    failed: int
    of_macos: int
    remarks: list[str]
    seen: Seen
    changed: int = 0


@dataclass
class Read:
    """What one shard holds.

    Attributes:
        table: its rows in tar order, as if it had never been read before.
        end_mark: whether zeros close the tar.
        of_macos, remarks, seen: as of `Ingested`.
    """

    table: pa.Table
    end_mark: bool
    of_macos: int
    remarks: list[str]
    seen: Seen


def ingest_shard(layout: Layout, path: Path, reading: Reading, run: str) -> Ingested:
    """Reads one shard and commits its rows.

    Raises:
        ShardError: the tar cannot be used; the table keeps what it had of it.
    """
    if fault := shard_name_fault(path):
        raise ShardError(f"the shard's name cannot be used: {fault}", where={"file": path}, fix="rename the file")
    shard = shard_name(path)
    source = identify(path, reading)
    read = read_shard(path, shard, reading, run)
    failed = read.table["source_status"].to_pylist().count("failed")
    done = Ingested(read.table.num_rows, failed, read.of_macos, read.remarks, read.seen)

    def following(earlier: Sequence[Path]) -> pa.Table:
        found = read.table
        if earlier:
            before = read_column_file(earlier[0])
            known = None if is_same_on_disk(before.source, source) else _digests(path, found)
            older = (read_column_file(file).table for file in earlier[1:])
            found, done.changed = follow(found, itertools.chain([before.table], older), known, run)
        if identify(path, reading) != source:
            raise ShardError(
                "the shard changed while it was read", where={"file": path}, fix="run the same command again"
            )
        return found

    commit_source(layout, shard, replace(source, end_mark=read.end_mark), following)
    return done


def is_same_on_disk(one: SourceShard | None, other: SourceShard) -> bool:
    """Whether a shard's bytes are trusted to be the same: a file of one size and time, wherever it lies."""
    return one is not None and (one.size, one.mtime_ns) == (other.size, other.mtime_ns)


def _digests(path: Path, rows: pa.Table) -> list[dict[str, int]]:
    with path.open("rb", buffering=0) as file:
        return digests(rows, partial(files.read_at, file.fileno()))


@no_collection()
def read_shard(path: Path, shard: str, reading: Reading, run: str) -> Read:
    """The rows of one shard, and what is strange about it.

    Raises:
        ShardError: the tar cannot be used.
    """
    with indexing.mapped(path) as view:
        index = indexing.index_of(view, path)
        found = group(index)
        remarks = _remarks(path, index, found)
        columns = columns_of(view, index, found, shard, reading.carried, reading.boxes)
    count, problems, notes = len(found), found.remarks.problems, found.remarks.notes
    columns["shard"] = pa.array([shard] * count, pa.string())
    columns["row"] = pa.array(range(count), pa.int64())
    columns["source_notes"] = _sparse(count, {row: "; ".join(texts) for row, texts in notes.items()})
    columns["source_status"] = pa.array(["failed" if row in problems else "ok" for row in range(count)], pa.string())
    columns["source_error"] = _sparse(count, problems)
    columns["source_run"] = pa.array([run] * count, pa.string())
    columns["source_inputs"] = inputs_hashes(reading.signature, [found.keys, found.sizes(index)])
    nothing = {column.name: pa.nulls(count, column.type) for column in reading.columns if column.name not in columns}
    table = pa.table({column.name: {**columns, **nothing}[column.name] for column in reading.columns})
    return Read(table, index.has_end_mark, found.of_macos, remarks, found.seen)


def _sorting(path: Path) -> str:
    """Commands that make a shard again, the members of each sample together; the old one stays, as `.unsorted`."""
    shard, made, files, old = (
        shlex.quote(f"{path.with_suffix('')}{end}") for end in (path.suffix, ".sorted.tar", ".files", ".unsorted")
    )
    return (
        f"mkdir {files} && tar -xf {shard} -C {files} && "
        f"tar --sort=name --transform='s,^\\./,,' -cf {made} -C {files} . && "
        f"mv {shard} {old} && mv {made} {shard} && rm -r {files}"
    )


def _remarks(path: Path, index: Index, found: Samples) -> list[str]:
    """What is strange about a shard as a whole; what concerns how many samples it has is noted at its last one."""
    remarks = []
    if not index.has_end_mark:
        remarks.append("it has no end mark: it was cut, and what followed is lost; download or make it again")
    if not len(index):
        what = f"only {index.file_size} bytes of zeros" if index.end == 0 else "only a global pax header"
        remarks.append(f"it holds no member, {what}")
    elif not len(found):
        remarks.append(f"none of its {len(index)} members belongs to a sample, the first is '{index.names[0][:100]}'")
    scattered = sum(text.startswith("ScatteredSample:") for text in found.remarks.problems.values())
    if scattered:
        is_double = len(set(index.names)) < len(index)  # unpacking it would lose one of two members of one name
        mend = "it has members of one name twice: make it again" if is_double else f"to sort it: {_sorting(path)}"
        remarks.append(f"the members of {scattered} samples do not lie together; {mend}")
    told = expected(path)
    if told is not None and told.samples != len(found):
        if told.samples is None:
            remarks.append(f"'{told.file}' beside it, which says how many samples it should have, cannot be read")
        else:
            remarks.append(f"it has {len(found)} samples, and '{told.file}' beside it says {told.samples}")
        if len(found):
            found.remarks.notes.setdefault(len(found) - 1, []).insert(0, OF_SHARD + remarks[-1])
    return remarks


def _sparse(count: int, texts: dict[int, str]) -> pa.Array:
    """A column of which only some rows have a text."""
    return pa.array([texts.get(row) for row in range(count)] if texts else [None] * count, pa.string())


def vanished(layout: Layout, found: Found) -> list[str]:
    """Shards of the table that the pipeline names no more: their rows stay, they are not written."""
    return [shard for shard in layout.shard_names() if shard not in found.paths]


def deal(paths: Sequence[Path], tasks: int) -> list[list[Path]]:
    """Deals shards to tasks in turn, so that neighbours are read at about the same time."""
    return [list(itertools.islice(paths, start, None, tasks)) for start in range(min(tasks, len(paths)))]
