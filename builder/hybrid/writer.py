"""Hybrid shards: stream each source shard in order, copy what is unchanged, splice the edited samples in.

Owns `shards/`: the manifest, and what is up to date. The output is a function of the source's bytes, the table's write
rows and the pipeline's rules alone; what an edited sample looks like is `builder.hybrid.edited_sample`'s.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import hashlib
import json
import math
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from builder import formats, machine
from builder.errors import BuilderError, ConfigError, ShardError, where
from builder.hybrid import edited_sample
from builder.hybrid.assembly import Assembly, Part, length
from builder.hybrid.edited_sample import Edit, Rules, edited_json, manifest_provenance, members_of
from builder.machine import Sort
from builder.sources.members import AGAIN
from builder.sources.tars.opening import opened
from builder.store import files
from builder.store.layout import Layout, RunFiles
from builder.table import column_files, partitions, schema
from builder.table.edits import EditsReader
from builder.table.origin import Origin
from builder.table.pointers import pointers_of
from builder.table.query import Samples
from builder.table.schema import Column, folded
from builder.table.sql_text import DuckError, Sql, batches, guarded
from builder.tar import blocks, indexing, record_heads
from builder.tar.index import Index

#: Part of every manifest's digest. A rule that changes the bytes of some samples alone is told by `_decisive` of these.
VERSION = "3"
_POINTER = ("image_path", "image_offset", "image_size")
_MADE = ("image_width", "image_height", "image_sha256", "image_seed", "image_model", "image_prompt", "prompt")
_KEYS = ("shard", "row", "uid")
_OTHER = ("dropped", "caption", "image_format")
_TYPES = {
    "shard": "varchar", "row": "bigint", "uid": "varchar", "dropped": "boolean", "caption": "varchar",
    "image_path": "varchar", "image_offset": "bigint", "image_size": "bigint", "image_width": "integer",
    "image_height": "integer", "image_sha256": "varchar", "image_seed": "bigint", "image_model": "varchar",
    "image_prompt": "varchar", "prompt": "varchar", "image_format": "varchar",
}  # fmt: skip
_SET = "set_"
#: Words for types of SQL that json does not have, or that Arrow does not hold: it takes the largest UHUGEINT for -1.
_NOT_IN_JSON = ("INTERVAL", "MAP(", "UNION(", "UHUGEINT")
#: Digits of a number, at most: Arrow's decimals have no more, and a HUGEINT has one more.
_DIGITS = 38
#: Bytes that an edited sample's json and headers may grow by, for the disk's sake.
_ADDED = 4096
#: Bytes that are read at a time around an edited sample's headers: its json and txt lie next to each other.
_NEAR = 8192
#: Members of edited samples with more bytes are copied from the source and not read whole.
_LARGE = 1 << 20
#: Times that a shard is written whose source's time of change, and nothing else, changes meanwhile.
_TRIES = 3
#: Between the extensions of a sample's members, none of which holds it.
_BETWEEN = "/"
_DIGEST = b"builder.digest"
_INFO = b"builder.output"


@dataclass
class ShardPlan:
    """What the table says of one hybrid shard.

    Attributes:
        on_disk: size and time of modification, ns, of the source when this plan was made; as ingested if it is gone.
        digest: of all that decides which samples differ, and how.
        stale: edited samples whose image is older than their prompt: image and caption stay the pair they were made as.
        refused: samples that the SQL returns and that are never edited, since their source is bad.
        kept: samples that the SQL returns and that stay the source's, by the reason (`edited_sample.REASONS`).
        rows: identity of the shard's rows (`table.rows_hash`) that the edits follow.
        frozen: the rows of the write SQL that it was made from.
    """

    shard: str
    source: Origin
    on_disk: tuple[int, int]
    edits: dict[int, Edit]
    digest: str
    rows: str
    stale: int = 0
    refused: int = 0
    kept: Counter[str] = field(default_factory=Counter)
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
        source_end_mark: whether zeros close the source; a hybrid shard has them always.
    """

    rows: int = 0
    edited: int = 0
    dropped: int = 0
    size: int = 0
    copied: int = 0
    source_end_mark: bool = True

    @property
    def statistics(self) -> dict[str, int | bool]:
        """What `_stats.json` says of it."""
        counts: dict[str, int | bool] = {
            "count": self.rows, "successes": self.rows - self.dropped, "edited": self.edited
        }  # fmt: skip
        return counts if self.source_end_mark else {**counts, "source_end_mark": False}


# --- the plan ---


def plans(
    layout: Layout,
    columns: Sequence[Column],
    shards: Sequence[str],
    sql: Sql,
    params: dict[str, Any],
    rules: Rules,
    refused: dict[str, BuilderError] | None = None,
) -> Iterator[ShardPlan]:
    """Evaluates the write SQL once and yields the plan of every shard, in order.

    Args:
        refused: takes the shards of which no plan can be made, with the reason; without it the first one ends all.

    Raises:
        ConfigError: the SQL returns a column that means nothing to the writer, or a row twice.
    """
    stage = image_stage(columns)
    with Samples(layout, columns, shards, deciding=[sql]) as samples:
        relation = samples.select(sql, params)
        returned = [_known(name) for name in samples.names(sql, params)]
        _check_columns(returned, [str(kind) for kind in relation.types], sql, rules)
        chosen = ", ".join(_cast(name) for name in returned)
        around = f"select {chosen} from {{}} w order by w.shard, w.row"
        beside = _columns_beside(columns, stage, returned)
        try:
            reader = samples.select(sql, params, around=around).to_arrow_reader(10_000)
            frozen = pa.schema([*reader.schema, *((name, pa.string()) for name in beside)])
            rows = _by_shard(reader, sql)
            waiting = next(rows, None)
            for shard in sorted(shards):
                state = partitions.partition_state(layout, shard)
                if state is None:
                    continue
                while waiting is not None and waiting[0] < shard:
                    waiting = next(rows, None)  # of a shard that the table does not have
                here: list[dict[str, Any]] = []
                try:
                    if waiting is not None and waiting[0] == shard:
                        here, state = _beside(layout, shard, waiting[1], beside)
                        waiting = next(rows, None)
                    plan = plan_shard(layout, shard, state, here, sql, stage, rules)
                except Exception as error:
                    if refused is None or not (isinstance(error, BuilderError) or machine.is_of_the_machine(error)):
                        raise
                    refused[shard] = error if isinstance(error, BuilderError) else machine.told(error)
                    continue
                plan.frozen_schema = frozen
                yield plan
        except DuckError as error:
            raise guarded(sql, error) from error


def _in_python(batch: pa.RecordBatch, sql: Sql) -> list[dict[str, Any]]:
    """The rows of a batch.

    Raises:
        ConfigError: a date or time that Python does not have, and json neither: infinity, years beyond 1 to 9999.
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except (OverflowError, ValueError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for i, value in enumerate(column):
                try:
                    value.as_py()
                except (OverflowError, ValueError) as error:
                    place = {key: batch.column(key)[i].as_py() for key in ("shard", "row")}
                    raise ConfigError(
                        f"write SQL returned '{name}' of type {value.type} outside the years 1 to 9999 (as infinity), "
                        "which json does not have",
                        where={"file": sql.origin, **place},
                        fix=f"return null or text: cast({name} as varchar)",
                    ) from error
        raise


def _known(name: str) -> str:
    """A column of the write SQL as the writer calls it: SQL does not tell the case of a name, json fields do."""
    lower = folded(name)
    if lower.startswith(_SET):
        return _SET + name[len(_SET) :]
    return lower if lower in _TYPES else name


def _cast(name: str) -> str:
    quoted = schema.quoted(name)
    return f"cast(w.{quoted} as {_TYPES[name]}) as {quoted}" if name in _TYPES else f"w.{quoted} as {quoted}"


def image_stage(columns: Sequence[Column]) -> str | None:
    """The stage that owns the image pointer."""
    return next((stage for stage, names in pointers_of(columns).items() if "image_path" in names), None)


def says_format(columns: Sequence[Column]) -> bool:
    """Whether the table says in which format images are; a stage's own output of that name may be something else."""
    return any(column.name == "image_format" and column.type == pa.string() for column in columns)


def _check_columns(returned: Sequence[str], types: Sequence[str], sql: Sql, rules: Rules) -> None:
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
    describing = edited_sample.DESCRIBING | {*rules.box_fields}
    owned = edited_sample.OWNED | (describing if "image_path" in returned else set())
    for name, kind in zip(returned, types, strict=True):
        if folded(name.removeprefix(_SET)) in owned and name.startswith(_SET):
            raise ConfigError(
                f"write SQL returned '{name}', which the writer sets itself",
                where=place,
                fix="leave it out" if folded(name) != f"{_SET}caption" else "return the new caption as: caption",
            )
        if name.startswith(_SET) and any(word in kind for word in _NOT_IN_JSON):
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


def _columns_beside(columns: Sequence[Column], stage: str | None, returned: Sequence[str]) -> dict[str, str]:
    """What the plan wants to know of a row beside what the SQL returns, and the column that says it."""
    beside = {"source_status": "source_status", "source_extensions": "source_members.list.element.ext"}
    if stage and "image_path" in returned:
        beside["image_run"] = f"{stage}_run"
        if says_format(columns):
            beside["image_format"] = "image_format"
    return {name: column for name, column in beside.items() if name not in returned}


def _beside(
    layout: Layout, shard: str, rows: list[dict[str, Any]], columns: dict[str, str]
) -> tuple[list[dict[str, Any]], partitions.State]:
    """The rows of the write SQL that the table has, with what `columns` say of them."""
    have, state = partitions.read_partition(layout, shard, list(columns.values()))
    known = [row for row in rows if row["row"] is not None and 0 <= row["row"] < have.num_rows]
    at = pa.array([row["row"] for row in known], pa.int64())
    found = {name: _texts(have[column].take(at)) for name, column in columns.items()}
    return [
        {**row, **dict(zip(found, values, strict=True))} for row, *values in zip(known, *found.values(), strict=True)
    ], state


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    """A column of text; of one with the members of samples the extensions of each."""
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    members = column.combine_chunks()
    lists = pa.ListArray.from_arrays(members.offsets, members.values.field("ext"))
    return list(pc.binary_join(lists, _BETWEEN).to_pylist())


def _by_shard(reader: pa.RecordBatchReader, sql: Sql) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    shard: str | None = None
    rows: list[dict[str, Any]] = []
    for batch in batches(reader):
        for row in _in_python(batch, sql):
            if row["shard"] != shard:
                if shard is not None:
                    yield shard, rows
                shard, rows = row["shard"], []
            rows.append(row)
    if shard is not None:
        yield shard, rows


def plan_shard(
    layout: Layout,
    shard: str,
    state: partitions.State,
    rows: list[dict[str, Any]],
    sql: Sql,
    stage: str | None,
    rules: Rules,
) -> ShardPlan:
    """The plan of one shard out of its rows of the write SQL.

    Args:
        stage: the stage that made the images, whose runs say how.
    """
    plan = ShardPlan(shard, state.source, _on_disk(state.source), {}, "", state.rows, frozen=rows)
    made_of = [VERSION, state.rows, state.source.size]
    if not state.source.end_mark:
        made_of.append("no end mark")
    digest = hashlib.sha256(json.dumps(made_of).encode())
    provenance = _Provenance(layout, stage)
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
        edit = _edit(row, provenance, rules)
        if isinstance(edit, str):
            plan.kept[edit] += 1
        elif edit is not None:
            plan.stale += edit.image is not None and row["image_prompt"] != row["prompt"]
            plan.edits[edit.row] = edit
            digest.update(_decisive(edit, row["source_extensions"]))
    plan.digest = digest.hexdigest()
    return plan


def _on_disk(source: Origin) -> tuple[int, int]:
    try:
        stat = Path(source.path).stat()
    except OSError:
        return source.size, source.mtime_ns  # whoever opens it says why
    return stat.st_size, stat.st_mtime_ns


def _decisive(edit: Edit, extensions: str) -> bytes:
    """What decides an edited sample's bytes: the image by its content, not by where it lies.

    Rules count where they make another sample than there was before them: what no rule has changed stays up to date.
    """
    image = [edit.made.get("image_sha256"), edit.image[2]] if edit.image else None
    values: list[Any] = [edit.row, edit.dropped, image, edit.caption, edit.fields, edit.made]
    has = edit.image is not None, edit.caption is not None
    if not edit.dropped and not edited_sample.was_so(tuple(extensions.split(_BETWEEN)), *has, edit.members):
        values.append([[member.extension, member.place] for member in edit.members])
    if edit.image and edit.boxes != Edit.boxes:
        values.append(edit.boxes)
    try:
        return orjson.dumps(values, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(values, sort_keys=True).encode()


def _edit(row: dict[str, Any], provenance: _Provenance, rules: Rules) -> Edit | str | None:
    """What becomes of a sample; None: nothing, text: nothing, for this reason."""
    fields = {
        name[len(_SET) :]: _json_value(value, name, row)
        for name, value in row.items()
        if value is not None and name.startswith(_SET)
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
        if row["image_offset"] is None or row["image_size"] is None:
            raise ConfigError(
                "an image has no image_offset or no image_size",
                where={"shard": row["shard"], "row": row["row"]},
                fix="return all of a row's image columns, or none of them",
            )
        made = {name: row.get(name) for name in _MADE if name != "prompt"}
        made |= provenance.of(row.get("image_run"))
        image = (row["image_path"], row["image_offset"], row["image_size"])
        caption = row["image_prompt"]
    elif row.get("caption") is None and not fields:
        return None
    else:
        made, image, caption = {}, None, row.get("caption")
    extensions = tuple(row["source_extensions"].split(_BETWEEN))
    kind = row.get("image_format") if image else None
    members = members_of(extensions, formats.named(kind) if image else None, caption is not None, bool(fields), rules)
    if isinstance(members, str):
        return members
    return Edit(
        row["row"], False, image, caption, fields, made, members, rules.box_fields, kind and formats.named(kind)
    )


def _json_value(value: Any, name: str, row: dict[str, Any]) -> Any:
    """A value of SQL as json has it: decimals as numbers, dates and times as ISO text.

    Raises:
        ConfigError: json has no such value.
    """
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, decimal.Decimal) and value.adjusted() < _DIGITS:
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return [_json_value(item, name, row) for item in value]
    if isinstance(value, dict):
        return {key: _json_value(item, name, row) for key, item in value.items()}
    is_long = isinstance(value, decimal.Decimal)
    what = f"{value}, which has more than {_DIGITS} digits" if is_long else f"{value!r}, which json does not have"
    raise ConfigError(
        f"write SQL returned '{name}' = {what}",
        where={"shard": row["shard"], "row": row["row"]},
        fix=f"return null, a number, text or a list: cast({name} as varchar)",
    )


class _Provenance:
    """Stage, version and options hash of images, out of their runs; each run is read once."""

    def __init__(self, layout: Layout, stage: str | None) -> None:
        self._layout, self._stage = layout, stage
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, run: str | None) -> dict[str, Any]:
        if self._stage is None or run is None:
            return {}
        if run not in self._known:
            self._known[run] = self._read(run)
        return self._known[run]

    def _read(self, run: str) -> dict[str, Any]:
        path = RunFiles(self._layout, run).description
        try:
            data = files.read_object(path)
            return {"stage": data["stage"], "version": data["version"], "options": data["options_hash"]}
        except (FileNotFoundError, ShardError, KeyError) as error:
            state = "gone" if isinstance(error, FileNotFoundError) else "damaged"
            raise ConfigError(
                f"run '{run}' is {state}, which says how images were made",
                where={"file": path},
                fix=f"make them again: builder stage {self._stage} --redo",
            ) from None


def is_written(layout: Layout, plan: ShardPlan) -> bool:
    """Whether a hybrid shard is up to date: made of the plan's edits and of the source as it is on disk now."""
    try:
        digest, output = read_description(layout.manifest(plan.shard))
        size = layout.hybrid(plan.shard).stat().st_size
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    except OSError as error:
        if machine.sort_of(error) is not Sort.ACCESS:
            raise
        return False  # it is written anew, where its disk gives it no more
    return (digest, output["source"], output["size"]) == (plan.digest, list(plan.on_disk), size)


def read_description(manifest: Path) -> tuple[str, dict[str, Any]]:
    """The digest that a hybrid shard was made of, and what it holds, as its manifest says.

    Raises:
        FileNotFoundError: there is no manifest.
        pyarrow.ArrowInvalid: it is damaged, or no manifest.
    """
    with manifest.open("rb") as file:
        metadata = partitions.footer_values(file, (_DIGEST, _INFO))
    try:
        info = json.loads((metadata or {})[_INFO])
        if not {"source", "size"} <= info.keys():
            raise ValueError
        return (metadata or {})[_DIGEST].decode(), info
    except (KeyError, ValueError, AttributeError) as error:
        raise pa.ArrowInvalid("it says nothing of a hybrid shard") from error


def sizes_of(layout: Layout, plan: ShardPlan) -> tuple[int, int]:
    """Bytes that a hybrid shard takes at most while it is written, and by how much it outgrows what it replaces."""
    size = plan.source.size + sum(edit.image[2] + _ADDED for edit in plan.edits.values() if edit.image)
    try:
        return size, size - layout.hybrid(plan.shard).stat().st_size
    except FileNotFoundError:
        return size, size


def free_bytes(layout: Layout) -> int:
    """Free bytes where hybrid shards go, or will go."""
    folder = layout.shards.absolute()
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
                fix="set dataset.root to another folder: hybrid shards go to its shards/, or where [write] folder says",
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
            files.remove(layout.manifest(plan.shard))
            inode = temp.stat().st_ino
            temp.replace(files.check_no_link(layout.hybrid(plan.shard)))
            files.sync_folder(layout.shards)
            files.write_atomic(layout.stats(plan.shard), json.dumps(written.statistics).encode())
            files.write_atomic(layout.manifest(plan.shard), manifest)
            if layout.hybrid(plan.shard).stat().st_ino == inode:
                return written


def _spliced(layout: Layout, plan: ShardPlan) -> tuple[Written, pa.Buffer, Path]:
    """Makes a hybrid shard under a temp name, durably; returns what it holds, its manifest and that name."""
    with opened(layout, plan.shard, plan.source) as source, EditsReader(layout.root) as edits:
        before = _identity(source)
        places, state = partitions.read_partition(layout, plan.shard, ["key", "source_members"])
        if state.source != plan.source:
            raise ShardError("the shard was ingested again while it was written", fix="run the same command again")
        check_apart(layout, [Path(plan.source.path)])
        made: list[_Splicer] = []

        def write(path: Path) -> None:
            was = before
            for _ in range(_TRIES):
                made.append(_Splicer(source, edits, plan, places))
                made[-1].write(path)
                now = _identity(source)
                if now == was:
                    return
                if now[:2] != was[:2]:
                    break
                was = now  # a link or a mode may be all that changed
            raise ShardError(
                "the source shard changed while it was copied",
                where={"file": plan.source.path},
                fix="run the same command again; if it stays so, ingest it as it is now: builder ingest",
            )

        temp = files.write_temp(layout.hybrid(plan.shard), write)
        return made[-1].written, made[-1].manifest, temp


def _identity(descriptor: int) -> tuple[int, int, int]:
    """What differs once a file was written to: its time of change, unlike that of modification, cannot be put back."""
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def write_sizes(layout: Layout) -> None:
    """Writes `sizes.json`, {tar name: samples}, of every hybrid shard: open_clip and DataComp read it.

    Raises:
        ShardError: what lies beside a hybrid shard does not say how many samples it holds.
    """
    sizes = {}
    for path in sorted(layout.shards.glob("*_stats.json")):
        hybrid = layout.hybrid(path.name[: -len("_stats.json")])
        if hybrid.exists():
            sizes[hybrid.name] = _samples_said(path, hybrid)
    text = json.dumps(sizes, indent=1).encode()
    if not layout.sizes().exists() or layout.sizes().read_bytes() != text:
        files.write_atomic(layout.sizes(), text)


def _samples_said(statistics: Path, hybrid: Path) -> int:
    with contextlib.suppress(ShardError):
        found = files.read_object(statistics).get("successes")
        if isinstance(found, int):
            return found
    raise ShardError(
        f"'{statistics.name}' does not say how many samples its shard holds",
        where={"file": statistics},
        fix=f"rm {shlex.quote(str(hybrid))}, then builder write: a shard of the table is written again",
    )


class _Members:
    """Where the members of one shard's rows lie in the source, as columns.

    Attributes:
        keys: of each row.
        first: where in the other columns each row begins, and the end of the last.
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
        """The members of one row, as `source_members` has them."""
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
        """First byte after the last record of one row."""
        own = slice(self.first[row], self.first[row + 1])
        return max(
            data + size + blocks.padding(size) for data, size in zip(self.data[own], self.size[own], strict=True)
        )


@dataclass(frozen=True)
class _Prepared:
    """One edited sample, ready to be written.

    Attributes:
        parts: header, content and padding of its members, in order.
        ranges: bytes of the source that it replaces, ascending.
        members: name and sha256 of each new member.
        provenance: of a sample without json, as the manifest carries it.
    """

    edit: Edit
    parts: list[Part]
    ranges: list[tuple[int, int]]
    members: list[tuple[str, str]]
    provenance: str | None = None


class _Splicer:
    """One hybrid shard in the making.

    Attributes:
        manifest: every member, as a parquet file, once it is written.
    """

    def __init__(self, source: int, edits: EditsReader, plan: ShardPlan, places: pa.Table) -> None:
        self._source, self._edits, self._plan = source, edits, plan
        self._members = _Members(places)
        self._window = (0, b"")
        self.manifest: pa.Buffer
        self._made: list[tuple[int, str, str]] = []  # row, name and sha256 of every new member
        self._provenance: dict[int, str] = {}  # of edited samples without json, by row
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
                    self._copy(made, at, start)  # members between that belong to no sample
                    at = stop
                self.written.dropped += prepared.edit.dropped
                self.written.edited += not prepared.edit.dropped
                self._made += [(prepared.edit.row, *member) for member in prepared.members]
                if prepared.provenance is not None:
                    self._provenance[prepared.edit.row] = prepared.provenance
            self._finish(made, at)
            self.written.size = made.size
            self.manifest = self._encoded(self._manifest())  # while the last parts are still being written

    def _prepare(self, edit: Edit) -> _Prepared:
        members = self._members.of(edit.row)
        parts: list[Part] = []
        made: list[tuple[str, str]] = []
        provenance = None
        if not edit.dropped:
            key = self._members.keys[edit.row]
            old = self._read(edit, members)
            for member, body, digest in self._bodies(edit, old):
                name = f"{key}.{member.extension}"
                size = length(body)
                head = record_heads.remake_record_head(old[member.place][0], name, size)
                parts += (head, body, bytes(blocks.padding(size)))
                made.append((name, digest or self._sha256(body)))
            if all(member.holds != "json" for member in edit.members):
                txt = old[next(member.place for member in edit.members if member.holds == "txt")][1]
                assert isinstance(txt, bytes)
                provenance = manifest_provenance(txt, edit)
        ranges = sorted(
            (place["header"], place["data"] + place["size"] + blocks.padding(place["size"])) for place in members
        )
        return _Prepared(edit, parts, ranges, made, provenance)

    def _ending(self) -> tuple[int, Index]:
        """First byte after the last member that is not dropped, and the source's members behind the last such row.

        What follows that byte is left out: dropped samples, and global pax headers, which Python's tarfile cannot read
        where no member follows them.
        """
        edits = self._plan.edits
        dropped = {row for row, edit in edits.items() if edit.dropped}
        last = next((row for row in reversed(range(len(self._members.keys))) if row not in dropped), -1)
        start = 0 if last < 0 else self._members.end(last)
        # Mostly only a few members or zeros are left to walk.
        tail = indexing.index_from(self._source, start, self._plan.source.size)
        gone = {place["header"] for row in dropped if row > last for place in self._members.of(row)}
        members = zip(tail.header.tolist(), tail.stop.tolist(), strict=True)
        return max([start, *(stop for header, stop in members if header not in gone)]), tail

    def _copy(self, made: Assembly, start: int, end: int) -> None:
        """Copies what belongs to no edited sample, up to the last member that stays."""
        end = min(end, self._stays)
        made.copy(start, end)
        self.written.copied += max(end - start, 0)

    def _finish(self, made: Assembly, at: int) -> None:
        """What follows the last edited sample: nothing edited copies the source's end, else the end is made anew."""
        tail = self._tail
        if not self._plan.edits and tail.has_end_mark and tail.end == self._stays:
            self._stays = self._plan.source.size
            self._copy(made, at, self._stays)
            return
        self._copy(made, at, self._stays)
        made.add([blocks.end_of_archive(made.size)])
        made.flush()

    def _read(self, edit: Edit, members: list[dict[str, Any]]) -> dict[int, tuple[bytes, Part]]:
        """Header and content of the members of an edited sample by position: of a large one its range, and nothing of
        those that go."""
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

    def _bodies(
        self, edit: Edit, old: dict[int, tuple[bytes, Part]]
    ) -> Iterator[tuple[edited_sample.Member, Part, str]]:
        """Each member of an edited sample with its content, and its sha256 where it is known."""
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

    def _json(self, edit: Edit, old: dict[int, tuple[bytes, Part]], member: edited_sample.Member) -> bytes:
        raw = None if member.is_added else self._whole(old[member.place][1])
        txt = next((self._whole(old[m.place][1]) for m in edit.members if m.extension.lower() == "txt"), None)
        try:
            return edited_json(raw, edit, txt)
        except (TypeError, ValueError) as error:  # the second of json, the first of json that is no object
            raise ShardError(
                f"the json of an edited sample is not what was ingested: {error}", where={"row": edit.row}, fix=AGAIN
            ) from error

    def _whole(self, content: Part) -> bytes:
        return content if isinstance(content, bytes) else files.read_at(self._source, content[0], length(content))

    def _picture(self, edit: Edit) -> tuple[bytes, str]:
        """The new image and its sha256, which is the table's."""
        assert edit.image is not None
        picture = self._edits.read(*edit.image)
        digest = hashlib.sha256(picture).hexdigest()
        if digest != edit.made["image_sha256"]:
            raise ShardError(
                "generated bytes are not those that the table describes",
                where={"row": edit.row, "edits tar": edit.image[0]},
                fix="generate the row again: builder stage generate --redo",
            )
        if (found := formats.of_bytes(picture)) not in (None, edit.kind or found):
            raise ShardError(
                f"a new image is {found}, and its row says {edit.kind}",
                where={"row": edit.row, "edits tar": edit.image[0]},
                fix="return image_format of the stage that made the image, beside image_path",
            )
        return picture, digest

    def _near(self, start: int, size: int) -> bytes:
        """Bytes of the source, out of those that were read last where they hold them."""
        at = start - self._window[0]
        if at < 0 or at + size > len(self._window[1]):
            length = max(size, min(_NEAR, self._plan.source.size - start))
            self._window = (start, files.read_at(self._source, start, length))
            at = 0
        return self._window[1][at : at + size]

    def _manifest(self) -> pa.Table:
        """Every member of the hybrid shard: row, member, sha256 of edited ones, origin; provenance of a sample that has
        no json for it, on the row of its first member."""
        members = self._members
        counts = np.diff(members.first)
        row_of = np.repeat(np.arange(len(counts)), counts)
        kept = ~np.isin(row_of, list(self._plan.edits))
        keys = pa.array(members.keys, pa.string()).take(pa.array(row_of[kept]))
        extensions = pa.array(members.extension, pa.string()).filter(pa.array(kept))
        names = pc.binary_join_element_wise(keys, extensions, ".")
        new = self._made
        rows = np.concatenate([row_of[kept], np.array([row for row, _, _ in new], np.int64)])
        count = len(names)
        table_ = pa.table(
            {
                "shard": pa.array([self._plan.shard] * len(rows), pa.string()),
                "row": pa.array(rows, pa.int64()),
                "member": pa.chunked_array([names, pa.array([name for _, name, _ in new], pa.string())]),
                "sha256": pa.chunked_array(
                    [pa.nulls(count, pa.string()), pa.array([digest for _, _, digest in new], pa.string())]
                ),
                "origin": pa.array(["source"] * count + ["edited"] * len(new), pa.string()),
                "provenance": pa.chunked_array([pa.nulls(count, pa.string()), pa.array(self._told(), pa.string())]),
            }
        )
        return table_.take(pa.array(np.argsort(rows, kind="stable")))

    def _told(self) -> list[str | None]:
        """The provenance of each new member that the manifest carries."""
        left = dict(self._provenance)
        return [left.pop(row, None) for row, _, _ in self._made]

    def _encoded(self, manifest: pa.Table) -> pa.Buffer:
        info = json.dumps({**vars(self.written), "source": self._plan.on_disk}).encode()
        sink = pa.BufferOutputStream()
        column_files.write_parquet(manifest, {_DIGEST: self._plan.digest.encode(), _INFO: info}, sink)
        return sink.getvalue()
