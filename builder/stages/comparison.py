"""How much two answers of a stage differ."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa


def difference(alone: pa.RecordBatch, within: pa.RecordBatch) -> float:
    """The largest difference of two answers: of numbers as it is, inf between other values that differ."""
    return max((_apart_by(a, b) for a, b in zip(alone.to_pylist(), within.to_pylist(), strict=True)), default=0.0)


def _apart_by(a: Any, b: Any) -> float:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((_apart_by(a[name], b[name]) for name in a), default=0.0)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max((_apart_by(*pair) for pair in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, float) and isinstance(b, float):
        if math.isnan(a) or math.isnan(b):
            return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
        return 0.0 if a == b else abs(a - b)
    return 0.0 if a == b else math.inf
