"""Hybrid shards: stream each source shard in order, copy what is unchanged, splice the edited samples in.

Owns `shards/`: what an edited sample looks like, the manifest, and what is up to date. The output is a function of the
source's bytes and the table's write rows alone.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from builder import files, query, table, tar
from builder.edits import EditsReader
from builder.errors import ConfigError, ShardError, where
from builder.layout import Layout, RunFiles
from builder.members import opened, place_of
from builder.query import Samples, Sql
from builder.schema import IMAGE_EXTENSIONS, Column
from builder.stage import pointers_of

#: Raised when the same table gives other bytes; part of every manifest's digest.
VERSION = "1"
_POINTER = ("image_path", "image_offset", "image_size")
_MADE = ("image_width", "image_height", "image_sha256", "image_seed", "image_model", "image_prompt", "prompt")
_KEYS = ("shard", "row", "uid")
_OTHER = ("dropped", "caption")
_TYPES = {
    "shard": "varchar", "row": "bigint", "uid": "varchar", "dropped": "boolean", "caption": "varchar",
    "image_path": "varchar", "image_offset": "bigint", "image_size": "bigint", "image_width": "integer",
    "image_height": "integer", "image_sha256": "varchar", "image_seed": "bigint", "image_model": "varchar",
    "image_prompt": "varchar", "prompt": "varchar",
}  # fmt: skip
#: json fields that the writer alone sets: always, and where there is a new image that they describe.
_OWNED = {"caption", "original_caption", "provenance"}
_DESCRIBING = {"width", "height", "original_width", "original_height", "sha256", "face_bboxes"}
_SET = "set_"
#: json fields that describe the replaced image: emptied, since the new one has no origin. Source: img2dataset's fields.
_EMPTIED = ("url", "exif")
#: Bytes that an edited sample's json and headers may grow by, for the disk's sake.
_ADDED = 4096
_DIGEST = b"builder.digest"
_INFO = b"builder.output"


@dataclass(frozen=True)
class Edit:
    """One row of the write SQL that changes a sample.

    Attributes:
        dropped: the sample is left out; then nothing else counts.
        image: path, offset and size of the new image, or None for a sample that keeps its own.
        caption: the new caption, or None for a sample that keeps its own.
        fields: json fields to set.
        made: how the image was made, for the json.
    """

    row: int
    dropped: bool = False
    image: tuple[str, int, int] | None = None
    caption: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)


@dataclass
class ShardPlan:
    """What the table says of one hybrid shard.

    Attributes:
        stale: edited samples whose image is older than their prompt: image and caption stay the pair they were made as.
        refused: samples that the SQL returns and that are never edited, since their source is bad.
        frozen: the rows of the write SQL that it was made from.
    """

    shard: str
    source: table.SourceShard
    edits: dict[int, Edit]
    digest: str
    stale: int = 0
    refused: int = 0
    frozen: list[dict[str, Any]] = field(default_factory=list)
    frozen_schema: pa.Schema | None = None


@dataclass
class Written:
    """What one hybrid shard holds.

    Attributes:
        rows: samples of the source shard.
        edited: samples that differ, dropped ones not counted.
        size: bytes of the tar.
        copied: of these, bytes copied from the source.
    """

    rows: int = 0
    edited: int = 0
    dropped: int = 0
    size: int = 0
    copied: int = 0


# --- the plan ---


def plans(
    layout: Layout, columns: Sequence[Column], shards: Sequence[str], sql: Sql, params: dict[str, Any]
) -> Iterator[ShardPlan]:
    """Evaluates the write SQL once and yields the plan of every shard, in order.

    Raises:
        ConfigError: the SQL returns a column that means nothing to the writer, or a row twice.
    """
    stage = image_stage(columns)
    with Samples(layout, columns, shards) as samples:
        relation = samples.select(sql, params)
        returned = relation.columns
        _check_columns(returned, [str(kind) for kind in relation.types], sql)
        chosen = ", ".join(f'cast(w."{n}" as {_TYPES[n]}) as "{n}"' if n in _TYPES else f'w."{n}"' for n in returned)
        run = f", s.{stage}_run as image_run" if stage and "image_path" in returned else ""
        around = (
            f"select {chosen}, s.source_status as source_status{run} from {{}} w"
            f" join samples s on w.shard = s.shard and w.row = s.row order by s.shard, s.row"
        )
        try:
            reader = samples.select(sql, params, around=around).to_arrow_reader(10_000)
            rows = _by_shard(reader)
            waiting = next(rows, None)
            for shard in sorted(shards):
                state = table.partition_state(layout, shard)
                if state is None:
                    continue
                here: list[dict[str, Any]] = []
                if waiting is not None and waiting[0] == shard:
                    here, waiting = waiting[1], next(rows, None)
                plan = plan_shard(layout, shard, state, here, sql, stage)
                plan.frozen_schema = reader.schema
                yield plan
        except query.DuckError as error:
            raise query.guarded(sql, error) from error


def image_stage(columns: Sequence[Column]) -> str | None:
    """The stage that owns the image pointer."""
    return next((stage for stage, names in pointers_of(columns).items() if "image_path" in names), None)


def _check_columns(returned: Sequence[str], types: Sequence[str], sql: Sql) -> None:
    place = {"file": sql.origin, "returned": ", ".join(returned)}
    for name in _KEYS:
        if name not in returned:
            raise ConfigError(f"write SQL returned no column '{name}'", where=place, fix="select shard, row, uid, ...")
    for name in returned:
        if name not in (*_KEYS, *_POINTER, *_MADE, *_OTHER) and not name.startswith(_SET):
            raise ConfigError(
                f"write SQL returned a column '{name}', which the writer does not know",
                where=place,
                fix=f"to set a json field write: {name} as {_SET}{name}",
            )
    owned = _OWNED | (_DESCRIBING if "image_path" in returned else set())
    for name, kind in zip(returned, types, strict=True):
        if name.removeprefix(_SET) in owned and name.startswith(_SET):
            raise ConfigError(
                f"write SQL returned '{name}', which the writer sets itself",
                where=place,
                fix="leave it out" if name != f"{_SET}caption" else "return the new caption as: caption",
            )
        if name.startswith(_SET) and ("INTERVAL" in kind or "MAP(" in kind):
            raise ConfigError(
                f"write SQL returned '{name}' of type {kind}, which json does not have",
                where=place,
                fix=f"cast it, for example: cast({name} as varchar)",
            )
    if "image_path" in returned and "caption" in returned:
        raise ConfigError(
            "write SQL returned both 'image_path' and 'caption'",
            where=place,
            fix="the caption of a new image is its image_prompt: leave caption out",
        )
    needed = (*_POINTER, "image_prompt", "prompt", "image_width", "image_height", "image_sha256")
    if "image_path" in returned and (missing := [name for name in needed if name not in returned]):
        raise ConfigError(
            f"write SQL returned 'image_path' without '{missing[0]}'",
            where=place,
            fix=f"image and caption belong together; select all of: {', '.join(needed)}",
        )


def _by_shard(reader: pa.RecordBatchReader) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    shard: str | None = None
    rows: list[dict[str, Any]] = []
    for batch in reader:
        for row in batch.to_pylist():
            if row["shard"] != shard:
                if shard is not None:
                    yield shard, rows
                shard, rows = row["shard"], []
            rows.append(row)
    if shard is not None:
        yield shard, rows


def plan_shard(
    layout: Layout, shard: str, state: table.State, rows: list[dict[str, Any]], sql: Sql, stage: str | None
) -> ShardPlan:
    """The plan of one shard out of its rows of the write SQL.

    Args:
        stage: the stage that made the images, whose runs say how.
    """
    plan = ShardPlan(shard, state.source, {}, "", frozen=rows)
    digest = hashlib.sha256(json.dumps([VERSION, state.rows, state.source.size, state.source.mtime_ns]).encode())
    seen: set[int] = set()
    for row in rows:
        if row["row"] in seen:
            raise ConfigError(
                f"write SQL returns row {row['row']} of shard '{shard}' more than once",
                where={"file": sql.origin},
                fix="each sample once: select distinct on (shard, row), or aggregate the join that repeats it",
            )
        seen.add(row["row"])
        if row["source_status"] != "ok":
            plan.refused += 1
            continue
        if (edit := _edit(layout, row, stage)) is not None:
            plan.stale += edit.image is not None and row["image_prompt"] != row["prompt"]
            plan.edits[edit.row] = edit
            digest.update(json.dumps(_decisive(edit), sort_keys=True, default=str).encode())
    plan.digest = digest.hexdigest()
    return plan


def _decisive(edit: Edit) -> list[Any]:
    """What decides an edited sample's bytes: the image by its content, not by where it lies."""
    image = [edit.made.get("image_sha256"), edit.image[2]] if edit.image else None
    return [edit.row, edit.dropped, image, edit.caption, edit.fields, edit.made]


def _edit(layout: Layout, row: dict[str, Any], stage: str | None) -> Edit | None:
    fields = {
        name[len(_SET) :]: _json_value(value, name, row)
        for name, value in row.items()
        if name.startswith(_SET) and value is not None
    }
    if row.get("dropped"):
        return Edit(row["row"], dropped=True)
    if row.get("image_path") is not None:
        if row["image_prompt"] is None:
            raise ConfigError(
                "an image has no image_prompt: its caption cannot be told",
                where={"shard": row["shard"], "row": row["row"]},
                fix="leave such rows out of the write SQL: where image_prompt is not null",
            )
        made = {name: row.get(name) for name in _MADE if name != "prompt"}
        made |= _provenance(layout, stage, row.get("image_run"))
        image = (row["image_path"], row["image_offset"], row["image_size"])
        return Edit(row["row"], image=image, caption=row["image_prompt"], fields=fields, made=made)
    if row.get("caption") is None and not fields:
        return None
    return Edit(row["row"], caption=row.get("caption"), fields=fields)


def _json_value(value: Any, name: str, row: dict[str, Any]) -> Any:
    """A value of SQL as json has it: decimals as numbers, dates and times as ISO text.

    Raises:
        ConfigError: json has no such value.
    """
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return [_json_value(item, name, row) for item in value]
    if isinstance(value, dict):
        return {key: _json_value(item, name, row) for key, item in value.items()}
    raise ConfigError(
        f"write SQL returned '{name}' = {value!r}, which json does not have",
        where={"shard": row["shard"], "row": row["row"]},
        fix=f"return null, a number, text or a list: cast({name} as varchar)",
    )


def _provenance(layout: Layout, stage: str | None, run: str | None) -> dict[str, Any]:
    """Stage, version and options hash of an image, out of its run."""
    if stage is None or run is None:
        return {}
    path = RunFiles(layout.run(run)).description
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise ConfigError(
            f"run '{run}' is gone, which says how images were made",
            where={"file": path},
            fix=f"make them again: builder stage {stage} --redo",
        ) from None
    return dict(_described(str(path), stat.st_mtime_ns))


_DESCRIBED: dict[tuple[str, int], dict[str, Any]] = {}


def _described(path: str, mtime: int) -> dict[str, Any]:
    if (path, mtime) not in _DESCRIBED:
        data = json.loads(Path(path).read_text("utf-8"))
        _DESCRIBED[path, mtime] = {"stage": data["stage"], "version": data["version"], "options": data["options_hash"]}
    return _DESCRIBED[path, mtime]


def is_written(layout: Layout, plan: ShardPlan) -> bool:
    """Whether a hybrid shard is up to date: its manifest's digest is the plan's and its size is right."""
    try:
        metadata = pq.read_schema(layout.manifest(plan.shard)).metadata or {}
        size = layout.hybrid(plan.shard).stat().st_size
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return metadata.get(_DIGEST) == plan.digest.encode() and json.loads(metadata[_INFO])["size"] == size


def sizes_of(layout: Layout, plan: ShardPlan) -> tuple[int, int]:
    """Bytes that a hybrid shard takes at most while it is written, and by how much it outgrows what it replaces."""
    size = plan.source.size + sum(edit.image[2] + _ADDED for edit in plan.edits.values() if edit.image)
    try:
        return size, size - layout.hybrid(plan.shard).stat().st_size
    except FileNotFoundError:
        return size, size


def free_bytes(layout: Layout) -> int:
    folder = layout.root
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_apart(layout: Layout, sources: Sequence[Path]) -> None:
    """Raises ConfigError if hybrid shards would lie where a source shard lies."""
    output = layout.shards.resolve()
    folders: dict[Path, Path] = {}
    for source in sources:
        folder = source.parent
        if folder not in folders:
            folders[folder] = folder.resolve()
        if folders[folder] == output or (source.is_symlink() and source.resolve().parent == output):
            raise ConfigError(
                "hybrid shards would be written where the source lies",
                where={"source": source, "output": layout.shards},
                fix="set dataset.root to another folder: hybrid shards go to its shards/",
            )


# --- one shard ---


def write_shard(layout: Layout, plan: ShardPlan) -> Written:
    """Writes one hybrid shard: a temp name, complete, renamed; stats after it, the manifest last.

    The old manifest goes first: a kill in between leaves a shard without one, which is written again, never a shard
    beside a manifest that describes another. Of two live copies the one that finds the other's tar starts again.

    Raises:
        ShardError: the source or an edits tar cannot be read; the old output stays.
    """
    with where(shard=plan.shard):
        while True:
            written, manifest, temp = _spliced(layout, plan)
            layout.manifest(plan.shard).unlink(missing_ok=True)
            inode = temp.stat().st_ino
            temp.replace(layout.hybrid(plan.shard))
            files.sync_folder(layout.shards)
            stats = {"count": written.rows, "successes": written.rows - written.dropped, "edited": written.edited}
            files.write_atomic(layout.stats(plan.shard), json.dumps(stats).encode())
            info = json.dumps({**vars(written), "source_size": plan.source.size}).encode()
            describe = partial(table.write_parquet, manifest, {_DIGEST: plan.digest.encode(), _INFO: info})
            files.write_atomic(layout.manifest(plan.shard), describe)
            if layout.hybrid(plan.shard).stat().st_ino == inode:
                return written


def _spliced(layout: Layout, plan: ShardPlan) -> tuple[Written, pa.Table, Path]:
    """Makes a hybrid shard under a temp name, durably; returns what it holds, its manifest and that name."""
    with opened(plan.source) as source, EditsReader(layout.root) as edits:
        places, state = table.read_partition(layout, plan.shard, ["key", "source_members", "source_status"])
        if state.source != plan.source:
            raise ShardError("the shard was ingested again while it was written", fix="run the same command again")
        check_apart(layout, [Path(plan.source.path)])
        splicer = _Splicer(source, edits, plan, places)
        temp = files.write_temp(layout.hybrid(plan.shard), splicer.write)
        return splicer.written, splicer.manifest(), temp


def write_sizes(layout: Layout) -> None:
    """Writes `sizes.json`, {tar name: samples}, of every hybrid shard: open_clip and DataComp read it."""
    sizes = {}
    for path in sorted(layout.shards.glob("*_stats.json")):
        name = path.name[: -len("_stats.json")] + ".tar"
        if (layout.shards / name).exists():
            sizes[name] = json.loads(path.read_text("utf-8"))["successes"]
    text = json.dumps(sizes, indent=1).encode()
    if not layout.sizes().exists() or layout.sizes().read_bytes() != text:
        files.write_atomic(layout.sizes(), text)


class _Splicer:
    """One hybrid shard in the making."""

    def __init__(self, source: int, edits: EditsReader, plan: ShardPlan, places: pa.Table) -> None:
        self._source, self._edits, self._plan = source, edits, plan
        self._keys = places["key"].to_pylist()
        self._members = places["source_members"]
        self.written = Written(rows=len(self._keys))
        self._names: list[str] = []
        self._hashes: list[str] = []
        self._rows: list[int] = []

    def write(self, path: Path) -> None:
        buffer = files.new_buffer()
        with path.open("wb", buffering=0) as file:
            target = file.fileno()
            at = 0
            for row in sorted(self._plan.edits):
                edit = self._plan.edits[row]
                members = self._members[row].as_py()
                records = [] if edit.dropped else self._records(edit, members)
                ranges = sorted(
                    (place["header"], place["data"] + place["size"] + tar.padding(place["size"])) for place in members
                )
                self._copy(target, at, ranges[0][0], buffer)
                for record in records:
                    files.write_all(target, record)
                    self.written.size += len(record)
                at = ranges[0][1]
                for start, stop in ranges[1:]:
                    self._copy(target, at, start, buffer)  # members between that belong to no sample
                    at = stop
                self.written.dropped += edit.dropped
                self.written.edited += not edit.dropped
            self._finish(target, at, buffer)

    def _copy(self, target: int, start: int, stop: int, buffer: memoryview) -> None:
        files.copy_range(self._source, target, start, stop, buffer)
        self.written.copied += stop - start
        self.written.size += stop - start

    def _finish(self, target: int, at: int, buffer: memoryview) -> None:
        """What follows the last edited sample: nothing edited copies the source's end, else the end is made anew."""
        if not self._plan.edits:
            self._copy(target, at, self._plan.source.size, buffer)
            return
        end = max(at, self._end_of_records())
        self._copy(target, at, end, buffer)
        tail = tar.end_of_archive(self.written.size)
        files.write_all(target, tail)
        self.written.size += len(tail)

    def _end_of_records(self) -> int:
        """First byte after the last record: behind the last sample only a few members or zeros are left to walk."""
        last = max(place["data"] + place["size"] + tar.padding(place["size"]) for place in self._members[-1].as_py())
        return tar.end_of_records(self._source, last, self._plan.source.size)

    def _records(self, edit: Edit, members: list[dict[str, Any]]) -> list[bytes]:
        """The records of an edited sample: members in the source's order, json and txt added where missing."""
        key = self._keys[edit.row]
        image = place_of(members, "image")
        assert image is not None
        picture = self._edits.read(*edit.image) if edit.image else None
        if picture is not None and hashlib.sha256(picture).hexdigest() != edit.made["image_sha256"]:
            raise ShardError(
                "generated bytes are not those that the table describes",
                where={"row": edit.row, "edits tar": edit.image[0] if edit.image else ""},
                fix="generate the row again: builder stage generate --redo",
            )
        json_place, txt_place = place_of(members, "json"), place_of(members, "txt")
        text = edited_json(self._read(json_place), edit)
        bodies: list[tuple[str, dict[str, Any], bytes]] = []
        for place in members:
            extension = place["ext"].lower()
            if place is image:
                new = "jpg" if picture is not None else place["ext"]
                bodies.append(
                    (new if extension != "jpeg" else place["ext"], place, picture or self._read(place) or b"")
                )
            elif extension in IMAGE_EXTENSIONS and picture is not None:
                continue  # another picture of the old sample
            elif place is json_place:
                bodies.append((place["ext"], place, text))
            elif place is txt_place and edit.caption is not None:
                bodies.append((place["ext"], place, edit.caption.encode()))
            else:
                bodies.append((place["ext"], place, self._read(place) or b""))
        if json_place is None:
            bodies.append(("json", image, text))
        if txt_place is None and edit.caption is not None:
            bodies.append(("txt", image, edit.caption.encode()))
        return [self._record(edit.row, f"{key}.{extension}", place, body) for extension, place, body in bodies]

    def _read(self, place: dict[str, Any] | None) -> bytes | None:
        return None if place is None else files.read_at(self._source, place["data"], place["size"])

    def _record(self, row: int, name: str, place: dict[str, Any], body: bytes) -> bytes:
        old = files.read_at(self._source, place["header"], place["data"] - place["header"])
        self._rows.append(row)
        self._names.append(name)
        self._hashes.append(hashlib.sha256(body).hexdigest())
        return tar.remake_record_head(old, name, len(body)) + body + bytes(tar.padding(len(body)))

    def manifest(self) -> pa.Table:
        """Every member of the hybrid shard: row, member, sha256 of edited ones, origin."""
        rows: list[int] = []
        names: list[str] = []
        hashes: list[str | None] = []
        origins: list[str] = []
        made: dict[int, list[int]] = {}
        for i, row in enumerate(self._rows):
            made.setdefault(row, []).append(i)
        for row, (key, members) in enumerate(zip(self._keys, self._members.to_pylist(), strict=True)):
            edit = self._plan.edits.get(row)
            if edit is None:
                new: list[tuple[str, str | None, str]] = [
                    (f"{key}.{place['ext']}", None, "source") for place in members
                ]
            else:
                new = [(self._names[i], self._hashes[i], "edited") for i in made.get(row, [])]
            for name, digest, origin in new:
                rows.append(row)
                names.append(name)
                hashes.append(digest)
                origins.append(origin)
        return pa.table(
            {
                "shard": pa.array([self._plan.shard] * len(rows), pa.string()),
                "row": pa.array(rows, pa.int64()),
                "member": pa.array(names, pa.string()),
                "sha256": pa.array(hashes, pa.string()),
                "origin": pa.array(origins, pa.string()),
            }
        )


def edited_json(raw: bytes | None, edit: Edit) -> bytes:
    """A sample's json with its new caption and, for a new image, what describes it; indent 4, ASCII, as img2dataset.

    `original_caption` keeps the first caption; `provenance` keeps every replaced field.
    """
    old: dict[str, Any] = _parsed(raw) if raw is not None else {}
    new = dict(old)
    changes: dict[str, Any] = {}
    if edit.caption is not None:
        changes["caption"] = edit.caption
    if edit.image:
        width, height = edit.made["image_width"], edit.made["image_height"]
        changes |= {"width": width, "height": height, "original_width": width, "original_height": height}
        changes["sha256"] = edit.made["image_sha256"]
        changes |= {name: "" for name in _EMPTIED if name in old}
        new.pop("face_bboxes", None)
    changes |= edit.fields
    replaced = {name: old[name] for name in (*changes, *(["face_bboxes"] if edit.image else [])) if name in old}
    new.update(changes)
    if edit.caption is not None:
        new["original_caption"] = old.get("original_caption", old.get("caption"))
    provenance: dict[str, Any] = {"replaced": replaced}
    if edit.image:
        names = {"image_model": "model", "image_seed": "seed", "image_prompt": "prompt"}
        provenance |= {short: edit.made.get(name) for name, short in names.items()}
        provenance |= {name: edit.made[name] for name in ("stage", "version", "options") if name in edit.made}
    if "provenance" in old:
        provenance["before"] = old["provenance"]
    new["provenance"] = provenance
    return json.dumps(new, indent=4).encode()


def _parsed(raw: bytes) -> dict[str, Any]:
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _finite(json.loads(raw))
    return dict(value)


def _finite(value: Any) -> Any:
    """A value without NaN and infinities, which Python writes and json does not have: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, dict) else value
