"""The one reading of boxes: what is cut, what is none, and that a column of them says the same as each alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.table import boxes

GOOD = [0.1, 0.1, 0.5, 0.9]


@pytest.mark.parametrize(
    "far", [1e-16, 1e-7, 0.005, 0.01], ids=["the last bit", "a float32", "half a hundredth", "a hundredth"]
)
@pytest.mark.parametrize("place", range(4))
def test_an_edge_a_hair_outside_is_cut_on_every_side(far: float, place: int) -> None:
    box = [0.0, 0.0, 1.0, 1.0]
    box[place] += far if place > 1 else -far
    read = boxes.read([GOOD, box])
    assert read.boxes == [GOOD, [0.0, 0.0, 1.0, 1.0]]
    is_beyond = box != [0.0, 0.0, 1.0, 1.0]  # 1 and the last bit is 1
    assert read.note == ("1 of 2 boxes cut at the edge" if is_beyond else "")


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([0, 0, 1.0101, 1], "lies outside 0..1"),
        ([-0.0101, 0, 1, 1], "lies outside 0..1"),
        ([0, 0, 10**400, 1], "lies outside 0..1"),
        ([12, 30, 120, 160], "lies outside 0..1"),
        ([0, 0, math.inf, 1], "holds a value that is not finite"),
        ([0, math.nan, 1, 1], "holds a value that is not finite"),
        ([0.5, 0, 0.4, 1], "is inverted"),
        ([0, 1.005, 1, 1.001], "is inverted"),
        ([0, 0, 1], "is not a list of four numbers"),
        ([0, 0, 1, True], "is not a list of four numbers"),
        ([0, 0, 1, None], "is not a list of four numbers"),
        ([0, 0, 1, "1"], "is not a list of four numbers"),
        ({"x": 0}, "is not a list of four numbers"),
        (None, "is not a list of four numbers"),
    ],
)
def test_a_box_that_is_none_makes_all_unknown(box: Any, fault: str) -> None:
    assert boxes.read([GOOD, box]) == boxes.Reading(None, f"box 1 {fault}")
    assert boxes.column([[GOOD, box]]) is None


def test_three_states_stay_apart() -> None:
    assert boxes.read(None) == boxes.Reading(None)
    assert boxes.read([]) == boxes.Reading([])
    assert boxes.read([GOOD]) == boxes.Reading([GOOD])
    column = boxes.column([None, [], [GOOD]])
    assert column is not None
    assert column.to_pylist() == [None, [], [GOOD]]


EDGES = st.one_of(st.floats(-0.02, 1.02), st.sampled_from([0, 1, 0.5, math.nan, math.inf, True, None, "0"]))
LISTS = st.one_of(st.none(), st.lists(st.lists(EDGES, min_size=3, max_size=5), max_size=3), st.just("text"))


@given(st.lists(LISTS, max_size=5))
def test_a_column_is_what_each_value_reads_as(values: list[Any]) -> None:
    read = [boxes.read(value) for value in values]
    for one in read:
        assert one.boxes is None or all(0 <= b[0] <= b[2] <= 1 and 0 <= b[1] <= b[3] <= 1 for b in one.boxes)
    column = boxes.column(values)
    if any(one.note for one in read):
        assert column is None
    else:
        assert column is not None
        assert column.to_pylist() == [one.boxes for one in read]
