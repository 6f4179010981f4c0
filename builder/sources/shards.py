"""Tar shards into the table: find them, index each once, read json and txt, commit.

Owns what a sample of a WebDataset shard means: its key, uid, caption, boxes and fields, and what is wrong with it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from builder import schema, tar
from builder.errors import ConfigError, ShardError
from builder.layout import Layout, shard_name
from builder.schema import IMAGE_EXTENSIONS, SOURCE, Column
from builder.stage import inputs_hashes
from builder.table import SourceShard, commit_source, fold, partition_state, rows_hash

#: Raised when a column of `source` changes its meaning.
VERSION = "1"
#: A json or txt member beyond this is not read into memory.
MAX_TEXT = 16 << 20
_HEX32 = re.compile(r"[0-9a-fA-F]{32}")
_BOM = b"\xef\xbb\xbf"
_TYPE_NAMES = {
    type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list",
    dict: "an object",
}  # fmt: skip


# --- which shards ---


@dataclass(frozen=True)
class Found:
    """The shards that a pipeline names.

    Attributes:
        paths: by shard name, in the order of the patterns, sorted within each.
        missing: paths that a pattern names and that do not exist; a wildcard that matches nothing stands for itself.
    """

    paths: dict[str, Path]
    missing: list[Path]


def find(patterns: Sequence[str]) -> Found:
    """Expands braces and globs, relative to the working directory.

    Raises:
        ConfigError: nothing matches, or two files would be one shard.
    """
    paths: dict[str, Path] = {}
    missing: dict[str, None] = {}
    folders = _Folders()
    for pattern in patterns:
        for name in expand_braces(pattern):
            matches = folders.matches(name)
            if not matches:
                missing[name] = None
            for match in matches:
                _add(paths, Path(match))
    if not paths:
        raise ConfigError("no shard matches dataset.shards", where=_looked_at(patterns), fix=_near(patterns))
    return Found(paths, [Path(name) for name in missing])


class _Folders:
    """Which files exist: each folder is listed once, since 43,000 questions for one name each take seconds."""

    def __init__(self) -> None:
        self._files: dict[str, set[str]] = {}

    def matches(self, name: str) -> list[str]:
        """The file of that very name, or the files that it matches as a glob, sorted."""
        if self._is_file(name):
            return [name]
        if not glob.has_magic(name):
            return []
        return [match for match in sorted(glob.glob(name, recursive=True)) if self._is_file(match)]  # noqa: PTH207

    def _is_file(self, name: str) -> bool:
        folder, slash, base = name.rpartition("/")
        if folder + slash not in self._files:
            self._files[folder + slash] = _files_in(folder + slash or ".")
        return base in self._files[folder + slash]


def _files_in(folder: str) -> set[str]:
    """Names of files in a folder, links to files too; none if it cannot be listed."""
    found = set()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_file():
                    found.add(entry.name)
    return found


def _add(paths: dict[str, Path], path: Path) -> None:
    shard = shard_name(path)
    other = paths.setdefault(shard, path)
    if other != path and other.resolve() != path.resolve():
        raise ConfigError(
            f"two shards are named '{shard}': a shard's name locates its samples",
            where={"one": other, "other": path},
            fix="rename one of them, or give each folder a dataset.root of its own",
        )


def _looked_at(patterns: Sequence[str]) -> dict[str, Any]:
    names = {name.rpartition("/")[0] or "." for pattern in patterns for name in expand_braces(pattern)}
    folders = sorted(str(Path(name)) for name in names)
    return {
        "pattern": ", ".join(patterns),
        "folder": ", ".join(
            f"{name} ({'exists' if Path(name).is_dir() else 'does not exist'})" for name in folders[:3]
        ),
        "working directory": Path.cwd(),
    }


def _near(patterns: Sequence[str]) -> str:
    folder = Path(next(iter(expand_braces(patterns[0])), ".")).parent if patterns else Path()
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
    """

    fields: dict[str, pa.DataType]
    boxes: str = "face_bboxes"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (*schema.IDENTITY, *schema.field_columns(self.fields), *schema.status_columns(SOURCE))

    @property
    def signature(self) -> str:
        kinds = {name: schema.type_text(kind) for name, kind in sorted(self.fields.items())}
        return hashlib.blake2b(json.dumps([VERSION, kinds, self.boxes]).encode(), digest_size=8).hexdigest()

    def beside(self, columns: Iterable[Column]) -> Reading:
        """This reading with the json fields that a root carries already: none of them leaves by another pipeline."""
        return Reading({**schema.carried_fields(columns), **self.fields}, self.boxes)

    def to_json(self) -> dict[str, Any]:
        return {"fields": {name: schema.type_text(kind) for name, kind in self.fields.items()}, "boxes": self.boxes}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Reading:
        return cls({name: schema.parse_type(kind) for name, kind in data["fields"].items()}, data["boxes"])


def identify(path: Path, reading: Reading) -> SourceShard:
    """What a shard is on disk now."""
    stat = path.stat()
    return SourceShard(str(path.resolve()), stat.st_size, stat.st_mtime_ns, reading.signature)


def is_ingested(layout: Layout, shard: str, path: Path, reading: Reading) -> bool:
    """Whether the table has this shard as it is now."""
    state = partition_state(layout, shard)
    return state is not None and state.source == identify(path, reading)


# --- one shard ---


@dataclass
class Ingested:
    """What ingest did with one shard."""

    rows: int
    failed: int


def ingest_shard(layout: Layout, path: Path, reading: Reading, run: str) -> Ingested:
    """Reads one shard and commits its rows.

    Raises:
        ShardError: the tar cannot be used; the table keeps what it had of it.
    """
    shard = shard_name(path)
    source = identify(path, reading)
    table, rows = read_shard(path, shard, reading, run)
    if identify(path, reading) != source:
        raise ShardError("the shard changed while it was read", where={"file": path}, fix="run the same command again")
    commit_source(layout, shard, table, rows, source)
    fold(layout, shard)
    failed = table["source_status"].to_pylist().count("failed")
    return Ingested(table.num_rows, failed)


@dataclass
class _Sample:
    key: str
    members: list[int] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    problem: str = ""
    notes: list[str] = field(default_factory=list)

    def fail(self, kind: str, message: str) -> None:
        self.problem = self.problem or f"{kind}: {message}"

    def note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)


def read_shard(path: Path, shard: str, reading: Reading, run: str) -> tuple[pa.Table, str]:
    """The rows of one shard in tar order and their identity.

    Raises:
        ShardError: the tar cannot be used.
    """
    index = tar.index(path)
    samples = _group(index)
    sizes = index.size.tolist()
    rows = rows_hash([s.key for s in samples], [[sizes[m] for m in s.members] for s in samples])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        table = _table(view, index, samples, shard, reading, run)
    return table, rows


def _group(index: tar.Index) -> list[_Sample]:
    """Neighbouring members with one key are a sample; members that belong to none do not part them."""
    samples: list[_Sample] = []
    by_key: dict[str, _Sample] = {}
    current: _Sample | None = None
    for i, (name, kind) in enumerate(zip(index.names, index.kind.tolist(), strict=True)):
        if kind not in tar.REGULAR and kind not in (ord("1"), ord("2"), ord("S")):
            continue
        parts = tar.split_name(name)
        if parts is None:
            continue
        key, extension = parts
        if current is None or key != current.key:
            current = _Sample(key)
            samples.append(current)
            if first := by_key.get(key):
                at = int(index.header[i])
                first.fail("ScatteredSample", f"its key comes back later in the shard, at byte {at}")
                current.fail(
                    "ScatteredSample", f"its key was there before, at byte {int(index.header[first.members[0]])}"
                )
            else:
                by_key[key] = current
        if extension.lower() in current.extensions:
            at = int(index.header[i])
            current.fail("DuplicateMember", f"a second member with extension '{extension.lower()}' at byte {at}")
        if kind not in tar.REGULAR:
            current.fail("LinkMember", f"member '{name}' is {tar.KINDS[kind]}, not a plain file")
        if i in index.bad_names:
            current.fail("BadName", f"member '{name}' has a name that is not UTF-8")
        current.members.append(i)
        current.extensions.append(extension.lower())
    for sample in samples:
        if not any(extension in IMAGE_EXTENSIONS for extension in sample.extensions):
            sample.fail("MissingImage", f"no jpg, jpeg, png or webp among: {', '.join(sample.extensions)}")
        for extension in ("json", "txt"):
            if extension not in sample.extensions:
                sample.note(f"no {extension}")
    if samples and not index.has_end_mark:
        samples[-1].note("the shard has no end mark: it may have been cut behind this sample")
    return samples


def _table(
    view: mmap.mmap, index: tar.Index, samples: list[_Sample], shard: str, reading: Reading, run: str
) -> pa.Table:
    data, size, header = index.data.tolist(), index.size.tolist(), index.header.tolist()
    kind_of = index.kind.tolist()
    columns: dict[str, list[Any]] = {column.name: [] for column in reading.columns}
    fields = list(zip(reading.fields.items(), schema.field_columns(reading.fields), strict=True))
    spans = []
    for row, sample in enumerate(samples):
        body = {
            extension: (data[member], size[member])
            for extension, member in zip(sample.extensions, sample.members, strict=True)
            if kind_of[member] in tar.REGULAR
        }
        values = _json(view, body, sample)
        columns["uid"].append(_uid(values, sample, shard))
        columns["row"].append(row)
        columns["key"].append(sample.key)
        caption, differs = _captions(view, body, values, sample)
        columns["caption"].append(caption)
        columns["caption_differs"].append(differs)
        columns["source_face_bboxes"].append(_boxes(values.get(reading.boxes), sample, reading.boxes))
        for side in ("width", "height"):
            columns[f"source_{side}"].append(_fitting(side, values.get(side), pa.int32(), sample))
        for (name, kind), column in fields:
            if name in ("width", "height") and kind == pa.int32():
                columns[column.name].append(columns[f"source_{name}"][-1])
                continue
            columns[column.name].append(_fitting(name, values.get(name), kind, sample))
        columns["source_members"].append(
            [
                {"ext": index.names[m][len(sample.key) + 1 :], "header": header[m], "data": data[m], "size": size[m]}
                for m in sample.members
            ]
        )
        columns["source_notes"].append("; ".join(sample.notes) or None)
        columns["source_status"].append("failed" if sample.problem else "ok")
        columns["source_error"].append(sample.problem or None)
        spans.append([size[m] for m in sample.members])
    count = len(samples)
    columns["shard"] = [shard] * count
    columns["source_run"] = [run] * count
    columns["source_inputs"] = inputs_hashes(reading.signature, [columns["key"], spans])
    return pa.table({c.name: pa.array(columns[c.name], c.type) for c in reading.columns})


def _text_of(view: mmap.mmap, body: dict[str, tuple[int, int]], extension: str) -> bytes | None:
    place = body.get(extension)
    return None if place is None or place[1] > MAX_TEXT else view[place[0] : place[0] + place[1]]


def _json(view: mmap.mmap, body: dict[str, tuple[int, int]], sample: _Sample) -> dict[str, Any]:
    """The sample's json object; empty where there is none. What does not parse fails the sample."""
    raw = _text_of(view, body, "json")
    if raw is None:
        if "json" in body:
            sample.fail("BadJson", f"the json has {body['json'][1]} bytes, the limit is {MAX_TEXT}")
        return {}
    if raw.startswith(_BOM):
        raw = raw[len(_BOM) :]
        sample.note("json begins with a byte order mark")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _lenient(raw, sample)
    if isinstance(value, dict):
        return value
    if not sample.problem.startswith("BadJson"):
        sample.fail("BadJson", f"the json is {_TYPE_NAMES[type(value)]}, not an object")
    return {}


def _lenient(raw: bytes, sample: _Sample) -> Any:
    """json with NaN and Infinity, which Python's json writes; other faults are told with their place."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        sample.fail("BadJson", f"the json is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        sample.fail("BadJson", f"{error.msg} at line {error.lineno} column {error.colno}")
    except RecursionError:
        sample.fail("BadJson", "the json is nested too deep")
    except ValueError as error:  # an integer of thousands of digits
        sample.fail("BadJson", str(error))
    return None


def _uid(values: dict[str, Any], sample: _Sample, shard: str) -> str:
    uid = values.get("uid")
    if isinstance(uid, str) and uid:
        if text := _storable(uid):
            return text
        sample.note("uid: text that is not Unicode")
    elif uid is not None and uid != "":
        sample.note(f"uid: expected text, found {_TYPE_NAMES[type(uid)]}")
    head = _HEX32.match(sample.key.rpartition("/")[2])
    return head[0] if head else hashlib.sha256(f"{shard}/{sample.key}".encode()).hexdigest()[:32]


def _storable(text: str) -> str | None:
    """The text, or None if it holds lone surrogates (json escapes allow them), which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def _captions(
    view: mmap.mmap, body: dict[str, tuple[int, int]], values: dict[str, Any], sample: _Sample
) -> tuple[str | None, bool | None]:
    """The caption, json's before txt's, and whether the two differ beyond white space at their ends."""
    from_json = _fitting("caption", values.get("caption"), pa.string(), sample)
    raw = _text_of(view, body, "txt")
    from_txt: str | None = None
    if raw is not None:
        try:
            from_txt = raw.removeprefix(_BOM).decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            sample.note(f"txt: not UTF-8 at byte {error.start}")
    elif "txt" in body:
        sample.note(f"txt: {body['txt'][1]} bytes, the limit is {MAX_TEXT}")
    if from_json is None or from_txt is None:
        return (from_txt if from_json is None else from_json), None
    return from_json, from_json.strip() != from_txt.strip()


def _boxes(value: Any, sample: _Sample, name: str) -> list[list[float]] | None:
    """Boxes [x1, y1, x2, y2] in 0..1; None = unknown. A value with one bad box is unknown as a whole."""
    if value is None:
        return None
    if not isinstance(value, list):
        sample.note(f"{name}: expected a list, found {_TYPE_NAMES[type(value)]}")
        return None
    for number, box in enumerate(value):
        if fault := _box_fault(box):
            sample.note(f"{name}: box {number} {fault}")
            return None
    return [[float(edge) for edge in box] for box in value]


def _box_fault(box: Any) -> str:
    if not isinstance(box, list) or len(box) != 4:
        return "is not a list of four numbers"
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in box):
        return "is not a list of four numbers"
    if not all(isinstance(edge, int) or math.isfinite(edge) for edge in box):
        return "holds a value that is not finite"
    if not all(0 <= edge <= 1 for edge in box):
        return "lies outside 0..1"
    if box[0] > box[2] or box[1] > box[3]:
        return "is inverted"
    return ""


def _fitting(name: str, value: Any, kind: pa.DataType, sample: _Sample) -> Any:
    """A json value as its column's type, or None with a note."""
    if value is None:
        return None
    if kind == pa.string():
        if isinstance(value, str):
            if _storable(value) is not None:
                return value
            sample.note(f"{name}: text that is not Unicode")
            return None
        if name not in schema.FIELD_TYPES and name != "caption" and (text := _dumped(value)) is not None:
            return text
        sample.note(f"{name}: expected text, found {_TYPE_NAMES[type(value)]}")
        return None
    try:
        if isinstance(value, bool) != pa.types.is_boolean(kind) and pa.types.is_primitive(kind):
            raise ValueError
        if pa.types.is_integer(kind) and isinstance(value, float):
            if not value.is_integer():
                raise ValueError
            value = int(value)
        return _converted(value, kind)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        sample.note(f"{name}: expected {schema.type_text(kind)}, found {_shown(value)}")
        return None


def _converted(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_int32(kind) and type(value) is int:
        if -(2**31) <= value < 2**31:
            return value
        raise OverflowError
    return pa.scalar(value, kind).as_py()


def _dumped(value: Any) -> str | None:
    """A json value as text, None if it is nested too deep for that."""
    try:
        return json.dumps(value)
    except RecursionError:
        return None


def _shown(value: Any) -> str:
    text = _dumped(value) or _TYPE_NAMES[type(value)]
    return text if len(text) <= 40 else text[:37] + "..."


def vanished(layout: Layout, found: Found) -> list[str]:
    """Shards of the table that the pipeline names no more: their rows stay, they are not written."""
    return [shard for shard in layout.shard_names() if shard not in found.paths]


def deal(paths: Sequence[Path], tasks: int) -> list[list[Path]]:
    """Deals shards to tasks in turn, so that neighbours are read at about the same time."""
    return [list(itertools.islice(paths, start, None, tasks)) for start in range(min(tasks, len(paths)))]
