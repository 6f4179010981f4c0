"""The columns of a shard's rows: uid, captions, boxes, sizes, json fields and members."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from builder.sources.base import MAX_NAMES
from builder.sources.tars.json_values import (
    MAX_DEPTH,
    TYPE_NAMES,
    Digits,
    dumped,
    exact_types,
    finite,
    is_deep,
    is_exact,
    transposed,
)
from builder.sources.tars.samples import ShardSamples, shown_value
from builder.table import boxes, schema
from builder.tar.index import Index

#: A larger json or txt member is not read into memory.
MAX_TEXT = 16 << 20
#: Samples that are parsed together, and the most bytes of json and txt in them: bounds memory.
BLOCK_SAMPLES, BLOCK_BYTES = 2_000, 64 << 20
_HEX32 = re.compile(r"[0-9a-fA-F]{32}")
_BOM = b"\xef\xbb\xbf"


# --- json and txt ---


def columns_of(
    view: mmap.mmap,
    index: Index,
    samples: ShardSamples,
    shard: str,
    fields: Sequence[schema.Column],
    box_field: str,
) -> dict[str, pa.ChunkedArray]:
    """uid, captions, boxes, size, fields and members of every sample, by column.

    Args:
        fields: columns of json fields.
        box_field: the json field with precomputed face boxes.
    """
    parts = [
        _Block(view, index, samples, start, stop).columns(shard, fields, box_field)
        for start, stop in _blocks(index, samples)
    ]
    columns = {name: pa.chunked_array([part[name] for part in parts]) for name in parts[0]} if parts else {}
    columns["key"] = pa.chunked_array([pa.array(samples.keys, pa.string())])
    columns["source_members"] = pa.chunked_array([_members(index, samples)])
    return columns


def _members(index: Index, samples: ShardSamples) -> pa.ListArray:
    places = {
        "ext": pa.array(samples.extensions, pa.string()),
        "header": pa.array(index.header[samples.members], pa.int64()),
        "data": pa.array(index.data[samples.members], pa.int64()),
        "size": pa.array(index.size[samples.members], pa.int64()),
    }
    structs = pa.StructArray.from_arrays([places[part.name] for part in schema.MEMBER], fields=list(schema.MEMBER))
    return pa.ListArray.from_arrays(pa.array(samples.first, pa.int32()), structs)


def _blocks(index: Index, samples: ShardSamples) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are parsed together."""
    if not samples.keys:
        return
    ends = np.cumsum(_text_sizes(index, samples.json) + _text_sizes(index, samples.txt))
    start = 0
    while start < len(samples):
        before = int(ends[start - 1]) if start else 0
        full = int(np.searchsorted(ends, before + BLOCK_BYTES, "right"))
        stop = min(max(full, start + 1), start + BLOCK_SAMPLES, len(samples))
        yield start, stop
        start = stop


def _text_sizes(index: Index, members: np.ndarray) -> np.ndarray:
    """How many bytes are read for each member; 0 for one that is missing or too large."""
    sizes = np.where(members >= 0, index.size[members], 0)
    return np.where(sizes <= MAX_TEXT, sizes, 0)


class _Block:
    """Samples next to each other, whose json and txt are in memory together.

    Args:
        start, stop: the range of their rows.
    """

    def __init__(self, view: mmap.mmap, index: Index, samples: ShardSamples, start: int, stop: int) -> None:
        self._view, self._index, self._samples, self._start, self._stop = view, index, samples, start, stop
        self._keys = samples.keys[start:stop]
        self._json, self._txt = samples.json[start:stop], samples.txt[start:stop]
        self._remarks = samples.remarks
        self._values: list[dict[str, Any]] = []
        self._raw: dict[str, Sequence[Any]] | None = None
        self._as_written: dict[int, dict[str, Any]] = {}

    def columns(self, shard: str, fields: Sequence[schema.Column], box_field: str) -> dict[str, pa.Array]:
        self._values = self._parsed(self._bodies(self._json))
        self._raw = transposed(self._values)
        found = {"uid": self._uids(shard), **self._captions()}
        found["source_face_bboxes"] = self._boxes(box_field)
        for side in ("width", "height"):
            found[f"source_{side}"] = self._field(side, pa.int32())
        for column in fields:
            name, kind = column.field, column.type
            same = f"source_{name}" if name in ("width", "height") and kind == pa.int32() else ""
            found[column.name] = found[same] if same else self._field(name, kind)
        self._see([*(column.field for column in fields), box_field])
        return found

    def _note(self, place: int, message: str) -> None:
        self._remarks.note(self._start + place, message)

    def _fail(self, place: int, message: str) -> None:
        self._remarks.fail(self._start + place, "BadJson", message)

    def _bodies(self, members: np.ndarray) -> list[bytes | None]:
        """The bytes of one member of each sample; None for one that is missing or too large."""
        sizes = self._index.size[members]
        starts = self._index.data[members]
        if len(members) and members.min() >= 0 and sizes.max() <= MAX_TEXT:
            ends = (starts + sizes).tolist()
            view = self._view
            return [view[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]
        return [
            self._view[start : start + size] if member >= 0 and size <= MAX_TEXT else None
            for member, start, size in zip(members.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        ]

    # --- json ---

    def _parsed(self, bodies: list[bytes | None]) -> list[dict[str, Any]]:
        """The json objects; empty for a sample without json. A sample whose json does not parse fails."""
        loads = orjson.loads
        try:
            values: list[Any] = [loads(body) for body in bodies]  # type: ignore[arg-type]
        except orjson.JSONDecodeError:
            values = [self._parsed_one(place, body) for place, body in enumerate(bodies)]
        for place, body in enumerate(bodies):
            if body and body.count(b"{") + body.count(b"[") > MAX_DEPTH and is_deep(values[place]):
                self._fail(place, "the json is nested too deep")
                values[place] = {}
        if set(map(type, values)) == {dict}:
            return values
        return [self._object(place, value) for place, value in enumerate(values)]

    def _parsed_one(self, place: int, raw: bytes | None) -> Any:
        if raw is None:
            if self._json[place] >= 0:
                size = self._index.size[self._json[place]]
                self._fail(place, f"the json has {size} bytes, the limit is {MAX_TEXT}")
            return {}
        if raw.startswith(_BOM):
            raw = raw[len(_BOM) :]
            self._note(place, "json begins with a byte order mark")
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError:
            return self._lenient(place, raw)

    def _lenient(self, place: int, raw: bytes) -> Any:
        """Parses json with NaN and Infinity, which Python's json writes; other errors fail the sample."""
        try:
            return json.loads(raw.decode("utf-8"), parse_float=finite)
        except UnicodeDecodeError as error:
            self._fail(place, f"the json is not UTF-8 at byte {error.start}")
        except json.JSONDecodeError as error:
            self._fail(place, f"{error.msg} at line {error.lineno} column {error.colno}")
        except RecursionError:
            self._fail(place, "the json is nested too deep")
        except ValueError as error:  # an integer of thousands of digits
            self._fail(place, str(error))
        return {}

    def _object(self, place: int, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self._fail(place, f"the json is {TYPE_NAMES[type(value)]}, not an object")
        return {}

    # --- columns ---

    def _see(self, wanted: Sequence[str]) -> None:
        """Records which of the wanted json fields the samples have; if one is missing, records all fields."""
        seen = self._samples.seen
        for name in set(wanted) - seen.wanted:
            if self._has_field(name):
                seen.wanted.add(name)
            elif len(seen.others) < MAX_NAMES:
                seen.others.update(*self._values)

    def _has_field(self, name: str) -> bool:
        if self._raw is not None:
            return name in self._raw
        return any(name in value for value in self._values)

    def _all(self, name: str) -> Sequence[Any]:
        """A json field of every sample; None where it is missing."""
        if self._raw is None:
            return [value.get(name) for value in self._values]
        return self._raw.get(name) or [None] * len(self._values)

    def _field(self, name: str, kind: pa.DataType) -> pa.Array:
        """A json field as a column; a value that does not fit becomes null, with a note."""
        raw = self._all(name)
        if set(map(type, raw)) <= exact_types(kind):
            try:
                return pa.array(raw, kind)
            except pa.ArrowMemoryError:
                raise
            except (pa.ArrowException, UnicodeEncodeError, OverflowError):
                pass  # a value does not fit: the slow way below notes which one
        return pa.array(_each(raw, lambda place, value: self._fitting(place, name, value, kind)), kind)

    def _fitting(self, place: int, name: str, value: Any, kind: pa.DataType) -> Any:
        """A json value as its column's type; None, with a note, if it does not fit."""
        if kind == pa.string():
            if type(value) is str:
                if _storable(value) is not None:
                    return value
                self._note(place, f"{name}: text that is not Unicode")
                return None
            if name not in schema.FIELD_TYPES and name not in ("caption", "uid"):
                exact = value if is_exact(value) else self._exact(place)[name]
                if (text := dumped(exact)) is not None:
                    return text
            self._note(place, f"{name}: expected text, found {TYPE_NAMES[type(value)]}")
            return None
        try:
            if isinstance(value, bool) != pa.types.is_boolean(kind) and pa.types.is_primitive(kind):
                raise ValueError
            if pa.types.is_integer(kind) and isinstance(value, float):
                if not value.is_integer():
                    raise ValueError
                value = int(value)
            return pa.scalar(value, kind).as_py()
        except pa.ArrowMemoryError:
            raise
        except (ValueError, TypeError, OverflowError, pa.ArrowException):
            self._note(place, f"{name}: expected {schema.type_text(kind)}, found {shown_value(value)}")
            return None

    def _exact(self, place: int) -> dict[str, Any]:
        """A sample's json with its numbers as they are written."""
        if place not in self._as_written:
            body = self._bodies(self._json[place : place + 1])[0] or b""
            text = body.removeprefix(_BOM).decode()
            self._as_written[place] = json.loads(text, parse_int=Digits, parse_float=Digits)
        return self._as_written[place]

    def _uids(self, shard: str) -> pa.Array:
        """The json's uid, else the 32 hex digits at the start of the key, else a hash of shard and key."""
        uids = self._field("uid", pa.string())
        missing = pc.fill_null(pc.equal(uids, ""), True)
        if not pc.any(missing).as_py():
            return uids
        keys = [key for key, is_missing in zip(self._keys, missing.to_pylist(), strict=True) if is_missing]
        return pc.replace_with_mask(uids, missing, pa.array([_uid_of(key, shard) for key in keys], pa.string()))

    def _captions(self) -> dict[str, pa.Array]:
        """The caption of the json, else of the txt, and whether the two differ in more than white space at the ends."""
        in_json, in_txt = self._field("caption", pa.string()).to_pylist(), self._texts()
        captions = [text if other is None else other for other, text in zip(in_json, in_txt, strict=True)]
        differs = [
            None if one is None or other is None else one != other and one.strip() != other.strip()
            for one, other in zip(in_json, in_txt, strict=True)
        ]
        return {"caption": pa.array(captions, pa.string()), "caption_differs": pa.array(differs, pa.bool_())}

    def _texts(self) -> list[str | None]:
        """The txt of each sample, without byte order mark and trailing line end."""
        raw = self._bodies(self._txt)
        joined = None if None in raw else b"\0".join(raw)  # type: ignore[arg-type]
        if joined is None or joined.count(0) != len(raw) - 1:
            return [self._text(place, body) for place, body in enumerate(raw)]
        try:
            texts: list[str | None] = list(joined.decode().split("\0"))
        except UnicodeDecodeError:
            return [self._text(place, body) for place, body in enumerate(raw)]
        ended = joined + b"\0"
        is_bare = b"\n\0" not in ended and b"\r\0" not in ended and _BOM not in ended
        return texts if is_bare else [_trimmed(text or "") for text in texts]

    def _text(self, place: int, raw: bytes | None) -> str | None:
        if raw is None:
            if self._txt[place] >= 0:
                self._note(place, f"txt: {self._index.size[self._txt[place]]} bytes, the limit is {MAX_TEXT}")
            return None
        try:
            return _trimmed(raw.decode())
        except UnicodeDecodeError as error:
            mark = len(_BOM) if raw.startswith(_BOM) else 0
            self._note(place, f"txt: not UTF-8 at byte {error.start - mark}")
            return None

    def _boxes(self, name: str) -> pa.Array:
        """The boxes [x1, y1, x2, y2] in 0..1; null if unknown."""
        raw = self._all(name)
        good = boxes.column(raw)
        if good is not None:
            return good
        return pa.array(_each(raw, lambda place, value: self._box_list(place, name, value)), schema.BOXES)

    def _box_list(self, place: int, name: str, value: Any) -> list[list[float]] | None:
        if not isinstance(value, list):
            self._note(place, f"{name}: expected a list, found {TYPE_NAMES[type(value)]}")
            return None
        found = boxes.read(value)
        if found.note:
            self._note(place, f"{name}: {found.note}")
        return found.boxes


def _each(raw: Sequence[Any], change: Callable[[int, Any], Any]) -> list[Any]:
    """Applies `change` to each position and value; null stays null."""
    return [None if value is None else change(place, value) for place, value in enumerate(raw)]


def _uid_of(key: str, shard: str) -> str:
    head = _HEX32.match(key.rpartition("/")[2])
    return head[0] if head else hashlib.sha256(f"{shard}/{key}".encode()).hexdigest()[:32]


def _trimmed(text: str) -> str:
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def _storable(text: str) -> str | None:
    """The text; None if it contains lone surrogates, which json allows as escapes but UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text
