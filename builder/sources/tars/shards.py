"""Tar shards as a source: the columns that ingest makes of them, and the rows of one shard."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from builder.config.problems import Problems
from builder.config.sections import DatasetSection
from builder.errors import SchemaError
from builder.progress import few
from builder.sources.base import OF_SHARD, Found, Read, Seen, Source
from builder.sources.changes import digests
from builder.sources.tars.collection import no_collection
from builder.sources.tars.columns import columns_of
from builder.sources.tars.expected import expected
from builder.sources.tars.finding import find_shards, why_missing
from builder.sources.tars.opening import OpenTar, opened
from builder.sources.tars.samples import ShardSamples, group
from builder.sources.tars.section import TarSection, fields_of
from builder.store import files
from builder.store.layout import Layout
from builder.table import schema
from builder.table.inputs_hash import inputs_hashes
from builder.table.origin import TARS, Origin
from builder.table.schema import SOURCE, Column
from builder.tar import indexing
from builder.tar.index import Index

#: The json field of face boxes unless a pipeline names another.
BOXES = "face_bboxes"


@dataclass(frozen=True)
class TarShards(Source):
    """Tar shards, and what ingest puts into the table from them.

    Attributes:
        fields: json fields with their types.
        boxes: the json field with precomputed face boxes.
        named: names of columns by json field, if they are not the usual ones.
        patterns: the files, as the pipeline names them.
    """

    kind: ClassVar[str] = TARS
    setting: ClassVar[str] = "dataset.shards"
    version: ClassVar[str] = "2"
    changes: ClassVar[dict[str, str]] = {
        "2": "the last sample of a shard without end mark has failed (NoEndMark): the shard was cut there; members "
        "that macOS puts next to files (._NAME, .DS_Store, __MACOSX/) belong to no sample; boxes up to 1 % of a side "
        "outside the picture are cut instead of unknown; numbers in fields of text have the digits that the json has",
    }
    has_hybrid_shards: ClassVar[bool] = True
    Options: ClassVar[type[DatasetSection]] = TarSection

    fields: dict[str, pa.DataType]
    boxes: str = BOXES
    named: dict[str, str] = field(default_factory=dict)
    patterns: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_options(cls, options: TarSection, problems: Problems) -> TarShards:
        fields, named = fields_of(options, problems)
        patterns = [options.shards] if isinstance(options.shards, str) else options.shards
        return cls(fields, options.boxes, named, tuple(patterns))

    def to_json(self) -> dict[str, Any]:
        fields = {name: schema.type_text(kind) for name, kind in self.fields.items()}
        return {"fields": fields, "boxes": self.boxes, "named": self.named}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TarShards:
        fields = {name: schema.parse_type(kind) for name, kind in data["fields"].items()}
        return cls(fields, data["boxes"], data["named"])

    @property
    def carried(self) -> tuple[Column, ...]:
        """The columns of the json fields."""
        return schema.field_columns(self.fields, self.named)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (*schema.IDENTITY, *self.carried, *schema.status_columns(SOURCE))

    @property
    def signature(self) -> str:
        """Hash of what ingest puts into the table: 16 hex digits."""
        kinds: dict[str, str | list[str]] = {}
        for column in sorted(self.carried, key=lambda column: column.field):
            kind = schema.type_text(column.type)
            kinds[column.field] = kind if schema.field_of(column.name) == column.field else [kind, column.name]
        return hashlib.blake2b(json.dumps(["1", kinds, self.boxes]).encode(), digest_size=8).hexdigest()

    def with_columns_of(self, columns: Iterable[Column]) -> TarShards:
        """These shards with the json fields that a root already has, so that another pipeline does not remove any.

        Raises:
            SchemaError: the root has one of the fields in another column, or two columns that differ only in case.
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
        return TarShards({**fields, **self.fields}, self.boxes, {**named, **self.named}, self.patterns)

    def find(self) -> Found:
        return find_shards(self.patterns)

    def why_missing(self, path: Path) -> str:
        return why_missing(path)

    def identify(self, path: Path) -> Origin:
        found = path.stat()
        return Origin(_real(path), found.st_size, found.st_mtime_ns, self.signature, self.version)

    def read(self, path: Path, shard: str, run: str) -> Read:
        return read_shard(path, shard, self, run)

    def digests(self, path: Path, rows: pa.Table) -> list[dict[str, int]]:
        with path.open("rb", buffering=0) as file:
            return digests(rows, partial(files.read_at, file.fileno()))

    def notices(self, seen: Seen) -> list[str]:
        """Messages about json fields that the pipeline names but no sample has: a name may be misspelt."""
        names = [*self.fields, *([self.boxes] if self.boxes != BOXES else [])]
        unseen = [name for name in names if name not in seen.wanted]
        if unseen and not seen.others:
            return [f"no sample that was read has a json field, so these are null: {few(unseen)}"]
        others = sorted(seen.others - set(names))
        texts = []
        for name in unseen:
            alike = [other for other in others if schema.folded(other) == schema.folded(name)]
            near = alike or difflib.get_close_matches(name, others, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"fields that there are: {few(others)}"
            texts.append(f"no sample that was read has the json field '{name}', which the pipeline names: {hint}")
        return texts

    def summary(self, counts: dict[str, int]) -> list[str]:
        count = counts.get("of_macos", 0)
        text = (
            f"{count} members that macOS adds next to files (._NAME, .DS_Store, __MACOSX/) belong to no sample; write "
            "copies them as they are"
        )
        return [text] if count else []

    @classmethod
    @contextlib.contextmanager
    def opened(cls, layout: Layout, shard: str, origin: Origin) -> Iterator[OpenTar]:
        with opened(layout, shard, origin) as descriptor:
            yield OpenTar(descriptor, origin)


def _real(path: Path) -> str:
    """The absolute path without links; each folder is resolved once, as it may contain tens of thousands of files."""
    return os.path.realpath(path) if path.is_symlink() else f"{_real_folder(path.parent.absolute())}/{path.name}"


@lru_cache(maxsize=256)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder).rstrip("/")


@no_collection()
def read_shard(path: Path, shard: str, source: TarShards, run: str) -> Read:
    """The rows of one shard, and remarks about it.

    Raises:
        ShardError: the tar cannot be used.
    """
    with indexing.mapped(path) as view:
        index = indexing.index_of(view, path)
        found = group(index)
        remarks = _remarks(path, index, found)
        columns = columns_of(view, index, found, shard, source.carried, source.boxes)
    count, problems, notes = len(found), found.remarks.problems, found.remarks.notes
    columns["shard"] = pa.array([shard] * count, pa.string())
    columns["row"] = pa.array(range(count), pa.int64())
    columns["source_notes"] = _sparse(count, {row: "; ".join(texts) for row, texts in notes.items()})
    columns["source_status"] = pa.array(["failed" if row in problems else "ok" for row in range(count)], pa.string())
    columns["source_error"] = _sparse(count, problems)
    columns["source_run"] = pa.array([run] * count, pa.string())
    columns["source_inputs"] = inputs_hashes(source.signature, [found.keys, found.sizes(index)])
    nothing = {column.name: pa.nulls(count, column.type) for column in source.columns if column.name not in columns}
    table = pa.table({column.name: {**columns, **nothing}[column.name] for column in source.columns})
    return Read(table, index.has_end_mark, {"of_macos": found.of_macos}, remarks, found.seen)


def _sorting(path: Path) -> str:
    """Commands that make a shard again with the members of each sample together; the old one is kept as `.unsorted`."""
    shard, made, files, old = (
        shlex.quote(f"{path.with_suffix('')}{end}") for end in (path.suffix, ".sorted.tar", ".files", ".unsorted")
    )
    return (
        f"mkdir {files} && tar -xf {shard} -C {files} && "
        f"tar --sort=name --transform='s,^\\./,,' -cf {made} -C {files} . && "
        f"mv {shard} {old} && mv {made} {shard} && rm -r {files}"
    )


def _remarks(path: Path, index: Index, found: ShardSamples) -> list[str]:
    """Remarks about a shard as a whole; one about the number of its samples is also noted at the last sample."""
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
        is_double = len(set(index.names)) < len(index)  # unpacking would lose one of two members of the same name
        fix = "it has two members of the same name: make it again" if is_double else f"to sort it: {_sorting(path)}"
        remarks.append(f"the members of {scattered} samples are not next to each other; {fix}")
    stated = expected(path)
    if stated is not None and stated.samples != len(found):
        # These two texts are stored in `source_notes`, so their wording is part of the table.
        if stated.samples is None:
            remarks.append(f"'{stated.file}' beside it, which says how many samples it should have, cannot be read")
        else:
            remarks.append(f"it has {len(found)} samples, and '{stated.file}' beside it says {stated.samples}")
        if len(found):
            found.remarks.notes.setdefault(len(found) - 1, []).insert(0, OF_SHARD + remarks[-1])
    return remarks


def _sparse(count: int, texts: dict[int, str]) -> pa.Array:
    """A column of text that is null in most rows."""
    return pa.array([texts.get(row) for row in range(count)] if texts else [None] * count, pa.string())
