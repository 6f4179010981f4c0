"""The section [dataset] of a pipeline over tar shards."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from builder.config.problems import Problems
from builder.config.sections import DatasetSection, Strict
from builder.errors import SchemaError
from builder.table import schema


class FieldSpec(Strict):
    """A json field with a given type: an entry `{name = ..., type = ...}` of `dataset.fields`."""

    #: The field's name in the json.
    name: str
    #: `string`, `bool`, `int32`, `int64`, `float64`, `list<TYPE>`, `struct<name: TYPE, ...>` and so on.
    type: str
    #: Its column in the table, where its own name is not free.
    column: str | None = Field(default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")


class TarSection(DatasetSection):
    """Tar shards: what goes in and where the table lies."""

    #: Values of required keys that are missing.
    stand_ins: ClassVar[dict[str, Any]] = {"shards": [], "root": ""}

    #: Tar shards: a path or a list of paths, with braces `{000..335}` and globs, from the working directory.
    shards: str | list[str]
    #: json fields carried into the table; others than DataComp's and img2dataset's are text unless {name, type}.
    fields: list[str | FieldSpec] = Field(default=[])
    #: The json field that holds precomputed face boxes.
    boxes: str = "face_bboxes"


def fields_of(dataset: TarSection, problems: Problems) -> tuple[dict[str, Any], dict[str, str]]:
    """The json fields with their Arrow types, and the column names that are given for some of them."""
    fields: dict[str, Any] = {}
    named: dict[str, str] = {}
    for item in dataset.fields:
        spec = item if isinstance(item, FieldSpec) else FieldSpec(name=item, type="")
        try:
            kind = schema.parse_type(spec.type) if spec.type else schema.FIELD_TYPES.get(spec.name, schema.TEXT)
            if spec.column:
                named[spec.name] = spec.column
            fields[spec.name] = kind
        except SchemaError as error:
            problems.add(("dataset", "fields"), f"field '{spec.name}': {error.what}\n{error.fix}")
    try:
        schema.field_columns(fields, named)
    except SchemaError as error:
        problems.add(("dataset", "fields"), f"{error.what}\n{error.fix}")
    return fields, named
