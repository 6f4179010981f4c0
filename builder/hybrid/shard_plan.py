"""What one hybrid shard is to become: which samples differ and how, and a digest of all that decides it."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from builder import formats, machine
from builder.errors import BuilderError, ConfigError
from builder.hybrid import edit as edited_sample
from builder.hybrid.edit import Edit, Rules, members_of
from builder.hybrid.image import MADE, Provenance, image_stage
from builder.hybrid.select import (
    BETWEEN,
    SET,
    by_shard,
    cast_column,
    check_columns,
    columns_beside,
    known_name,
    with_table,
)
from builder.store.layout import Layout
from builder.table import partitions
from builder.table.origin import Origin
from builder.table.query import Samples
from builder.table.schema import Column
from builder.table.sql_text import DuckError, Sql, guarded

#: Part of every manifest's digest. A rule that changes the bytes of some samples alone is told by `_decisive` of these.
VERSION = "3"
#: Digits of a number, at most: Arrow's decimals have no more, and a HUGEINT has one more.
_DIGITS = 38


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
        returned = [known_name(name) for name in samples.names(sql, params)]
        check_columns(returned, [str(kind) for kind in relation.types], sql, rules)
        chosen = ", ".join(cast_column(name) for name in returned)
        around = f"select {chosen} from {{}} w order by w.shard, w.row"
        beside = columns_beside(columns, stage, returned)
        try:
            reader = samples.select(sql, params, around=around).to_arrow_reader(10_000)
            frozen = pa.schema([*reader.schema, *((name, pa.string()) for name in beside)])
            rows = by_shard(reader, sql)
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
                        here, state = with_table(layout, shard, waiting[1], beside)
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
    provenance = Provenance(layout, stage)
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
    if not edit.dropped and not edited_sample.was_so(tuple(extensions.split(BETWEEN)), *has, edit.members):
        values.append([[member.extension, member.place] for member in edit.members])
    if edit.image and edit.boxes != Edit.boxes:
        values.append(edit.boxes)
    try:
        return orjson.dumps(values, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(values, sort_keys=True).encode()


def _edit(row: dict[str, Any], provenance: Provenance, rules: Rules) -> Edit | str | None:
    """What becomes of a sample; None: nothing, text: nothing, for this reason."""
    fields = {
        name[len(SET) :]: _json_value(value, name, row)
        for name, value in row.items()
        if value is not None and name.startswith(SET)
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
        made = {name: row.get(name) for name in MADE if name != "prompt"}
        made |= provenance.of(row.get("image_run"))
        image = (row["image_path"], row["image_offset"], row["image_size"])
        caption = row["image_prompt"]
    elif row.get("caption") is None and not fields:
        return None
    else:
        made, image, caption = {}, None, row.get("caption")
    extensions = tuple(row["source_extensions"].split(BETWEEN))
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
