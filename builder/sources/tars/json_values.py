"""Converts values of a sample's json for the table: numbers as they are written, types that fit a column."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

#: A sample fails if its json is nested deeper: writer and verify recurse into json, and Python stops at 1,000 frames.
MAX_DEPTH = 100
TYPE_NAMES = {
    type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list",
    dict: "an object",
}  # fmt: skip


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` times."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [part for part in level if isinstance(part, list | dict)]
        if not level:
            return False
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return True


def transposed(values: Sequence[dict[str, Any]]) -> dict[str, Sequence[Any]] | None:
    """The values of json objects by field, if all have the same fields in the same order; else None."""
    names = list(values[0])
    if not names or any(list(value) != names for value in values):
        return None
    return dict(zip(names, zip(*map(dict.values, values), strict=True), strict=True))


def exact_types(kind: pa.DataType) -> set[type]:
    """The Python types of json values that a column of this type holds unchanged, including null."""
    none = type(None)
    if kind == pa.string():
        return {str, none}
    if pa.types.is_integer(kind):
        return {int, none}
    if pa.types.is_floating(kind):
        return {float, int, none}
    return {bool, none} if pa.types.is_boolean(kind) else {none}


class Digits(str):
    """A json number as it is written."""

    __slots__ = ()


TYPE_NAMES[Digits] = "a number"


def finite(text: str) -> float | Digits:
    """A json number as a float, or as it is written if a float cannot hold it."""
    number = float(text)
    return number if math.isfinite(number) else Digits(text)


def is_exact(value: Any) -> bool:
    """Whether a parsed json value is written with the same digits again; floats and zero (-0) may not be."""
    if isinstance(value, list):
        return all(map(is_exact, value))
    if isinstance(value, dict):
        return all(map(is_exact, value.values()))
    return not isinstance(value, float) and (value != 0 or isinstance(value, bool))


def dumped(value: Any) -> str | None:
    """A json value as text, with numbers as they are written; None if it is nested too deep."""
    try:
        return _written(value)
    except RecursionError:
        return None


def _written(value: Any) -> str:
    if isinstance(value, Digits):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_written(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
