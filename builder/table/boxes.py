"""Reads and checks the boxes of faces in files; cuts those that extend slightly beyond the picture.

Owns the meaning of `[x1, y1, x2, y2]` in 0..1 of width and height, whatever file the boxes come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

#: How far an edge may be outside the picture, as a share of its side: rounding and detectors stay within that, boxes in
#: pixels do not.
HAIR = 0.01


@dataclass(frozen=True)
class Reading:
    """What a file says about the faces of one picture.

    Attributes:
        boxes: within 0..1; None if they are unknown.
        note: what was cut, or why they are unknown; empty if nothing is wrong.
    """

    boxes: list[list[float]] | None
    note: str = ""


def read(value: Any) -> Reading:
    """The boxes of one picture; if one is invalid, all are unknown, since their number is not known any more."""
    if value is None:
        return Reading(None)
    if not isinstance(value, list | tuple):
        return Reading(None, "no list of boxes")
    if all(map(_is_inside, value)):
        return Reading([list(map(float, box)) for box in value])
    for number, box in enumerate(value):
        if fault := _fault(box):
            return Reading(None, f"box {number} {fault}")
    boxes = [[min(max(float(edge), 0.0), 1.0) for edge in box] for box in value]
    cut = sum(any(edge < 0 or edge > 1 for edge in box) for box in value)
    return Reading(boxes, f"{cut} of {len(boxes)} boxes cut at the edge" if cut else "")


def _is_inside(box: Any) -> bool:
    """Whether a box is valid and inside the picture."""
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        return False
    return bool(0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1)


def _fault(box: Any) -> str:
    """Why a box is invalid; empty if it is valid."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return "is not a list of four numbers"
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in box):
        return "is not a list of four numbers"
    if not all(isinstance(edge, int) or math.isfinite(edge) for edge in box):
        return "holds a value that is not finite"
    if not all(-HAIR <= edge <= 1 + HAIR for edge in box):
        return "lies outside 0..1"
    if box[0] > box[2] or box[1] > box[3]:
        return "is inverted"
    return ""


def column(values: Sequence[Any]) -> pa.ListArray | None:
    """The boxes of many pictures as a column, if all are valid; None if some have to be `read`."""
    if not set(map(type, values)) <= {list, type(None)}:
        return None
    boxes = list(chain.from_iterable(value for value in values if value))
    if not set(map(type, boxes)) <= {list} or not set(map(len, boxes)) <= {4}:
        return None
    edges = list(chain.from_iterable(boxes))
    if not set(map(type, edges)) <= {int, float}:
        return None
    try:
        corners = np.array(edges, np.float64).reshape(-1, 4)
    except OverflowError:
        return None
    is_right = (corners >= 0).all() and (corners <= 1).all() and (corners[:, :2] <= corners[:, 2:]).all()
    if not is_right:
        return None
    counts = np.array([len(value) if value else 0 for value in values], np.int32)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    inner = pa.ListArray.from_arrays(pa.array(np.arange(0, 4 * len(boxes) + 1, 4), pa.int32()), corners.ravel())
    unknown = np.array([value is None for value in values], bool)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner, mask=pa.array(unknown))
