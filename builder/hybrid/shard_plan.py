"""The plan of one hybrid shard: which samples change and how, and a digest of that."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from builder import formats
from builder.errors import BuilderError, ConfigError
from builder.hybrid import select
from builder.hybrid.edit import Edit, Rules, members_of, was_so
from builder.hybrid.image import Provenance, image_in, image_stage
from builder.hybrid.manifest import VERSION
from builder.store.layout import Layout
from builder.table import partitions
from builder.table.origin import Origin
from builder.table.schema import Column
from builder.table.sql_text import Sql

#: Most digits of a number: Arrow's limit; HUGEINT can have one more.
_DIGITS = 38


@dataclass
class ShardPlan:
    """Which samples of one hybrid shard change, and how.

    Attributes:
        on_disk: size and time of modification (ns) of the source when this plan was made; as ingested if it is gone.
        digest: of everything that decides which samples change, and how.
        stale: edited samples whose image is older than their prompt; their caption is the image's prompt.
        refused: selected samples that are not edited because their source is bad.
        kept: selected samples that stay as in the source, by reason (`edit.REASONS`).
        rows: identity of the shard's rows that the plan was made from (`column_files.rows_hash`).
        selected, row_schema: the selection that it was made from (`select.Selection`).
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
    selected: list[dict[str, Any]] = field(default_factory=list)
    row_schema: pa.Schema | None = None


def plans(
    layout: Layout,
    columns: Sequence[Column],
    shards: Sequence[str],
    sql: Sql,
    params: dict[str, Any],
    rules: Rules,
    refused: dict[str, BuilderError] | None = None,
    state: Callable[[str], partitions.State | None] | None = None,
) -> Iterator[ShardPlan]:
    """Evaluates the write SQL once and yields the plan of every shard, in order.

    Args:
        refused: collects shards without a plan, and why; if None, the first such error is raised.
        state: as in `select.select`.

    Raises:
        ConfigError: as `select.select`; an image has only some of its columns, or its run is gone; a value cannot be
            written as json.
    """
    stage = image_stage(columns)
    selections = select.select(
        layout, columns, shards, sql, params, boxes=rules.box_fields, refused=refused, state=state
    )
    for found in selections:
        try:
            plan = plan_shard(layout, found.shard, found.state, found.rows, stage, rules)
        except Exception as error:
            select.note_refused(refused, found.shard, error)
            continue
        plan.row_schema = found.row_schema
        yield plan


def plan_shard(
    layout: Layout,
    shard: str,
    state: partitions.State,
    rows: list[dict[str, Any]],
    stage: str | None,
    rules: Rules,
) -> ShardPlan:
    """The plan of one shard, from its selected rows.

    Args:
        stage: the stage that made the images.
    """
    plan = ShardPlan(shard, state.source, _on_disk(state.source), {}, "", state.rows, selected=rows)
    made_of = [VERSION, state.rows, state.source.size]
    if not state.source.end_mark:
        made_of.append("no end mark")
    digest = hashlib.sha256(json.dumps(made_of).encode())
    provenance = Provenance(layout, stage)
    for row in rows:
        if row["source_status"] != "ok":
            plan.refused += 1
            continue
        edit = _edit(row, provenance, rules)
        if isinstance(edit, str):
            plan.kept[edit] += 1
        elif edit is not None:
            if edit.image is not None and row["image_prompt"] != row["prompt"]:
                plan.stale += 1
            plan.edits[edit.row] = edit
            digest.update(_decisive(edit, select.extensions_of(row)))
    plan.digest = digest.hexdigest()
    return plan


def _on_disk(source: Origin) -> tuple[int, int]:
    try:
        stat = Path(source.path).stat()
    except OSError:
        return source.size, source.mtime_ns  # opening it later reports why
    return stat.st_size, stat.st_mtime_ns


def _decisive(edit: Edit, extensions: tuple[str, ...]) -> bytes:
    """What decides an edited sample's bytes (the image's content, not its location).

    Rules count only if they change the sample that version 3 of the writer made, so that other shards stay up to date.
    """
    image = [edit.made.get("image_sha256"), edit.image[2]] if edit.image else None
    values: list[Any] = [edit.row, edit.dropped, image, edit.caption, edit.fields, edit.made]
    has_image, has_caption = edit.image is not None, edit.caption is not None
    if not edit.dropped and not was_so(extensions, has_image, has_caption, edit.members):
        values.append([[member.extension, member.place] for member in edit.members])
    if edit.image and edit.boxes != Edit.boxes:
        values.append(edit.boxes)
    try:
        return orjson.dumps(values, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(values, sort_keys=True).encode()


def _edit(row: dict[str, Any], provenance: Provenance, rules: Rules) -> Edit | str | None:
    """The edit of a selected sample; None if the row changes nothing; a reason (`edit.REASONS`) if it is not edited."""
    fields = {
        name.removeprefix(select.SET): _json_value(value, name, row)
        for name, value in row.items()
        if value is not None and name.startswith(select.SET)
    }
    if row.get("dropped"):
        return Edit(row["row"], dropped=True)
    image = image_in(row, provenance)
    caption = row.get("caption") if image is None else image.prompt
    if image is None and caption is None and not fields:
        return None
    kind = None if image is None else image.kind or formats.JPG
    members = members_of(select.extensions_of(row), kind, caption is not None, bool(fields), rules)
    if isinstance(members, str):
        return members
    edit = Edit(row["row"], caption=caption, fields=fields, members=members, boxes=rules.box_fields)
    if image is not None:
        edit = replace(edit, image=image.place, made=image.made, kind=image.kind)
    return edit


def _json_value(value: Any, name: str, row: dict[str, Any]) -> Any:
    """A value of SQL for json: decimals as numbers, dates and times as ISO text.

    Raises:
        ConfigError: it cannot be written as json.
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
