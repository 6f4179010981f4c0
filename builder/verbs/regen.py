"""Makes one generated image again, from the table alone, and compares it with the one that is stored.

Owns `builder regen`. What made an image is in its row and in the description of its run, which are data: the stage's
code is the pipeline's, or builder's own.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from builder import formats
from builder.engine import runs, workset
from builder.engine.batches import Failure, Left, answer
from builder.engine.work import Choice, Work
from builder.errors import ConfigError, ShardError, StageError
from builder.executors.base import take_task_defaults
from builder.hybrid import image
from builder.sources.members import EDIT
from builder.sources.reader import MemberReader
from builder.stages.contract import Stage, formats_asked
from builder.stages.finding import find, own_code
from builder.stages.signature import options_hash
from builder.store.layout import RunFiles
from builder.table import schema
from builder.table.sql_text import Sql
from builder.verbs.pipeline import Pipeline
from builder.verbs.show import find_samples
from builder.verbs.snapshot import Snapshot
from builder.verbs.stage import python_of


class _Run(BaseModel):
    """How an image was made, by the description of its run."""

    run: str
    stage: str
    version: str
    builder: str
    options: dict[str, Any]
    params: dict[str, Any]
    packages: dict[str, str]
    sql: Sql
    python_file: str | None = None


@dataclass
class Again:
    """An image that was made again.

    Attributes:
        stored: the bytes that the table points at; None if they are gone.
        made: the bytes of now.
        mean: mean absolute difference of their pixels, 0 to 255; None for pictures of different sizes.
        most: the largest difference of a pixel.
        reasons: what has changed since the image was made.
    """

    shard: str
    row: int
    uid: str
    stored: bytes | None
    made: bytes
    mean: float | None = None
    most: int | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        return self.stored == self.made


def regenerate(pipeline: Pipeline, uid: str, *, device: str | None = None) -> Again:
    """Makes the image of one sample again, as its run made it.

    Args:
        uid: of the sample, or SHARD:ROW.
        device: what to make it on; the stage's first device if absent.

    Raises:
        ConfigError: no such sample, or none with a generated image; its run, or the model's package, is gone.
        StageError: the stage cannot start, or fails on the row.
    """
    stage_name = image.image_stage(Snapshot(pipeline).known_columns)
    rows = [row for row in find_samples(pipeline, uid) if row.get("image_path") is not None]
    if not rows or stage_name is None:
        raise ConfigError(
            f"sample '{uid}' has no generated image",
            fix="builder sql 'select uid from samples where image_path is not null limit 5'",
        )
    if len(rows) > 1:
        places = [f"{row['shard']}:{row['row']}" for row in rows]
        raise ConfigError(
            f"{len(rows)} samples have the uid '{uid}'",
            where={"places": ", ".join(places)},
            fix=f"name one of these, for example: builder regen {shlex.quote(places[0])}",
        )
    [row] = rows
    run = _run_of(pipeline, stage_name, row[f"{stage_name}_run"])
    kind = _code_of(pipeline, stage_name)
    stage, options = _stage_of(kind, run, row)
    inputs = _inputs(pipeline, run, stage, options, row)
    take_task_defaults()
    place = device or (pipeline.stages[stage_name].run.devices[0] if stage_name in pipeline.stages else "cpu")
    with own_code(kind, stage_name):
        stage.setup(place)
        try:
            [(_, found)] = list(answer(stage, inputs))
        finally:
            stage.close()
    if isinstance(found, Left) and found.why is not None:
        raise found.why
    if not isinstance(found, pa.RecordBatch):
        raise StageError(
            f"the image cannot be made again: {found.error if isinstance(found, Failure) else 'it was stopped'}",
            where={"shard": row["shard"], "row": row["row"]},
            fix=f"make a new one: {_redo(stage_name, row)}",
        )
    values = found.to_pylist()[0]
    again = Again(row["shard"], row["row"], row["uid"], _stored(pipeline, row), values["image"])
    again.reasons = [*_other_code(pipeline, stage_name, run), *_reasons(run, stage, row, values)]
    if again.stored is not None and not again.is_same:
        _compare(again)
    return again


def _run_of(pipeline: Pipeline, stage: str, name: str) -> _Run:
    """The description of an image's run.

    Raises:
        ConfigError: it is gone, or does not say how the image was made.
    """
    try:
        return _Run.model_validate(runs.read(RunFiles(pipeline.layout, name)))
    except ValidationError as error:
        [first, *_] = error.errors()
        raise ConfigError(
            f"run '{name}' does not say how the image was made: {first['msg']}",
            where={"run": name, "field": ".".join(map(str, first["loc"]))},
            fix=f"make it again: builder stage {stage} --redo",
        ) from None


def _stored(pipeline: Pipeline, row: dict[str, Any]) -> bytes | None:
    with MemberReader(pipeline.layout, row["shard"], [EDIT]) as reader, contextlib.suppress(ShardError):
        return reader.read(row["row"], EDIT)
    return None


def _code_of(pipeline: Pipeline, name: str) -> type[Stage]:
    """The class of the stage that makes the images, as the pipeline names it: never a file that the root names.

    Raises:
        ConfigError: the pipeline names no such stage, and none is installed.
    """
    if name in pipeline.stages:
        return type(pipeline.stages[name].stage)
    try:
        return find(name)
    except StageError as error:
        raise ConfigError(
            f"the pipeline has no stage '{name}', which made the image",
            where={"file": pipeline.config.path},
            fix=f'add [stages.{name}] with its code, for example: python = "my_stage.py:MyStage"',
        ) from error


def _redo(stage: str, row: Mapping[str, Any]) -> str:
    """The command that makes one sample's image anew."""
    where = f"shard = {schema.literal(row['shard'])} and row = {row['row']}"
    return f"builder stage {stage} --redo --where {shlex.quote(where)}"


def _other_code(pipeline: Pipeline, name: str, run: _Run) -> list[str]:
    """Reports if the stage's code is in another place than when the image was made."""
    now = python_of(pipeline.stages[name]) if name in pipeline.stages else None
    then = run.python_file
    return [] if then == now else [f"code of stage '{name}': {then or 'installed'}, now {now or 'installed'}"]


def _stage_of(kind: type[Stage], run: _Run, row: dict[str, Any]) -> tuple[Stage, BaseModel]:
    """The stage, with the options of its run and what the row has recorded of them.

    Raises:
        ConfigError: this version does not know one of the options.
    """
    options = kind.as_made(run.options, row)
    try:
        known = kind.Options.model_validate_json(json.dumps(options))
    except ValidationError as error:
        [first, *_] = error.errors()
        raise ConfigError(
            f"stage '{run.stage}' no longer takes the options of the image's run: {first['msg']}",
            where={"run": run.run, "option": ".".join(map(str, first["loc"]))},
            fix=f"use the version that made it: builder {run.builder}",
        ) from error
    return kind(known), known


def _inputs(pipeline: Pipeline, run: _Run, stage: Stage, options: BaseModel, row: dict[str, Any]) -> pa.RecordBatch:
    """The row's inputs: as its answer has recorded them, the others as the run's SQL gives them.

    If the SQL no longer returns the row, they are taken from the table's columns of the same names.

    Raises:
        ConfigError: the SQL does not return the row, and the table has no such column.
    """
    condition = f"shard = '{row['shard'].replace(chr(39), 2 * chr(39))}' and row = {row['row']}"
    work = Work(
        stage,
        run.sql,
        run.params,
        Choice(redo=True, where=condition),
        [row["shard"]],
        Snapshot(pipeline).known_columns,
        options_hash(stage, options),
    )
    found = workset.first_rows(pipeline.layout, work, 1, repeatable=False)
    recorded = stage.recorded
    given = found.to_pylist()[0] if found.num_rows else row
    asked = [pa.field(name, pa.string()) for name in formats_asked(stage)]
    values = {field.name: row[recorded[field.name]] for field in stage.inputs if field.name in recorded}
    values |= {
        field.name: row.get(field.name) or formats.JPG for field in asked
    }  # older answers are jpg and record no format
    if lacking := [field.name for field in stage.inputs if field.name not in {*values, *given}]:
        raise ConfigError(
            "the work SQL of the image's run no longer returns its sample",
            where={"shard": row["shard"], "row": row["row"], "sql": run.sql.origin, "needed": ", ".join(lacking)},
            fix=f"make a new image: {_redo(stage.name, row)}",
        )
    keys = [pa.field("shard", pa.string()), pa.field("row", pa.int64()), pa.field("uid", pa.string())]
    fields = [*keys, *stage.inputs, *asked]
    columns = [pa.array([values.get(field.name, given.get(field.name))], field.type) for field in fields]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _reasons(run: _Run, stage: Stage, row: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """What has changed: the stage's version, packages, and facts that the answer has recorded."""
    found = []
    if run.version != stage.version:
        found.append(f"stage '{stage.name}': version {run.version}, now {stage.version}")
    now = runs.versions({*stage.packages, *run.packages})
    for name in sorted({*run.packages, *now}):
        then = run.packages.get(name)
        if then != now.get(name):
            found.append(f"{name}: {_said(then)}, now {now.get(name, 'not installed')}")
    for name, value in values.items():
        if name != "image" and name in row and row[name] != value:
            found.append(f"{name}: {_said(row[name])}, now {_said(value)}")
    return found


def _said(value: Any) -> Any:
    return "not recorded" if value is None else value


def _compare(again: Again) -> None:
    """Measures how different the pixels are."""
    from builder.models.pictures import decode, pixel_difference

    assert again.stored is not None
    try:
        stored, made = decode(again.stored), decode(again.made)
    except ValueError as error:
        again.reasons.insert(0, f"the stored bytes are not a picture: {error}")
        return
    if found := pixel_difference(stored, made):
        again.mean, again.most = found
