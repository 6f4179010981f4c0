"""The verb `show`: everything about one sample."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder import formats
from builder.errors import ConfigError
from builder.progress import few
from builder.sources.members import place_of
from builder.sources.reader import MemberReader
from builder.store import files
from builder.table import partitions
from builder.table.sql_text import Sql
from builder.verbs.pipeline import Pipeline
from builder.verbs.sql import all_samples

#: SHARD:ROW, and a number of digits that no row number reaches.
_PLACE = re.compile(r"(?P<shard>.+):(?P<row>[0-9]+)")
_MOST_DIGITS = 19


def find_samples(pipeline: Pipeline, uid: str) -> list[dict[str, Any]]:
    """Every column of the samples of one uid, or of the one at `SHARD:ROW`.

    Raises:
        ConfigError: the table has no such sample.
    """
    by_place = Sql("select * from samples where shard = $shard and row = $row", "show")
    by_uid = Sql("select * from samples where uid = $uid order by shard, row", "show")
    place = _PLACE.fullmatch(uid)
    with all_samples(pipeline) as samples:
        rows: list[dict[str, Any]] = []
        if place and len(place["row"]) < _MOST_DIGITS:
            rows = samples.table(by_place, {"shard": place["shard"], "row": int(place["row"])}).to_pylist()
        rows = rows or samples.table(by_uid, {"uid": uid}).to_pylist()
    if not rows:
        raise _no_sample(pipeline, uid, place)
    return rows


def _no_sample(pipeline: Pipeline, uid: str, place: re.Match[str] | None) -> ConfigError:
    """Why nothing is shown: an unknown uid, shard or row."""
    root, shards = {"root": pipeline.layout.root}, pipeline.layout.partitions()
    if place is None:
        return ConfigError(
            f"no sample has the uid '{uid}'",
            where=root,
            fix="give a uid of the table (builder sql 'select uid from samples limit 5'), or SHARD:ROW",
        )
    shard = place["shard"]
    if shard not in shards:
        near = difflib.get_close_matches(shard, shards, 1)
        return ConfigError(
            f"the table has no shard '{shard}', and no sample has the uid '{uid}'",
            where={**root, "shards": few(shards) or "none"},
            fix=f"did you mean '{near[0]}'?" if near else "give a shard of the table, or a uid",
        )
    count = partitions.read_partition(pipeline.layout, shard, ["row"])[0].num_rows
    return ConfigError(
        f"shard '{shard}' has no row {place['row']}",
        where={**root, "its rows": f"0 to {count - 1}" if count else "none"},
        fix=f"give one of these: builder show {shlex.quote(f'{shard}:{count - 1}')}" if count else "give another shard",
    )


def save_images(pipeline: Pipeline, rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the source image and the generated one of samples; returns the files."""
    saved = []
    for row in rows:
        wanted = ["image"] if row.get("image_path") is None else ["image", "edit"]
        with MemberReader(pipeline.layout, row["shard"], wanted) as reader:
            for member in wanted:
                data = reader.read(row["row"], member)
                if data is None:
                    continue
                place = place_of(row["source_members"], "image")
                extension = formats.of_bytes(data) if member == "edit" else place and place["ext"].lower()
                name = "new" if member == "edit" else "source"
                path = folder / f"{row['shard']}-{row['row']:06d}-{name}.{extension or formats.JPG}"
                files.write_atomic(path, data, durable=False)
                saved.append(path)
    return saved
