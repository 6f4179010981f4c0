"""Assigned groups: the same wherever they are asked for, every combination as likely, neighbours independent."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from builder.errors import ConfigError
from builder.models.llm.groups import Groups, text_of

ETHNICITY = ["Black", "white", "Asian", "Latino", "Middle Eastern", "Indian"]
GENDER = ["man", "woman"]
#: 0.999 quantiles of chi-square, by degrees of freedom. Source: NIST, Engineering Statistics Handbook, 1.3.6.7.4.
CHI_SQUARE = {1: 10.828, 5: 20.515, 11: 31.264, 35: 66.619}


def chi_square(counts: Counter[object], cells: int) -> float:
    expected = counts.total() / cells
    return sum((count - expected) ** 2 / expected for count in counts.values()) + expected * (cells - len(counts))


def test_one_value_of_each_attribute_in_the_order_given() -> None:
    groups = Groups([ETHNICITY, GENDER])
    assert groups.count == 12
    assert all(one in ETHNICITY and two in GENDER for one, two in (groups.of(f"u{i}", "k") for i in range(100)))
    assert text_of(("Middle Eastern", "woman")) == "Middle Eastern woman"


def test_the_choice_is_fixed() -> None:
    assert [text_of(Groups([ETHNICITY, GENDER]).of(f"{i:032x}", f"{i:032x}-0")) for i in range(6)] == [
        "Asian woman",
        "Black man",
        "Black woman",
        "white woman",
        "white man",
        "Black woman",
    ]


def test_a_table_of_attributes_is_their_lists() -> None:
    table = Groups({"ethnicity": ETHNICITY, "gender": GENDER}, seed=3)
    assert [table.of(f"u{i}", "k") for i in range(50)] == [
        Groups([ETHNICITY, GENDER], seed=3).of(f"u{i}", "k") for i in range(50)
    ]


def test_every_combination_is_as_likely() -> None:
    groups = Groups([ETHNICITY, GENDER])
    counts = Counter(groups.of(f"{i:032x}", f"{i:032x}-0") for i in range(60_000))
    assert chi_square(counts, 12) < CHI_SQUARE[11]


def test_a_biased_choice_would_be_told() -> None:
    counts = Counter(i % 100 % 12 for i in range(60_000))
    assert chi_square(counts, 12) > CHI_SQUARE[11]


def test_neighbours_attributes_and_keys_of_one_uid_are_independent() -> None:
    groups = Groups([ETHNICITY, GENDER])
    chosen = [groups.of(f"{i:032x}", "k") for i in range(36_001)]
    assert chi_square(Counter((a[0], b[0]) for a, b in itertools.pairwise(chosen)), 36) < CHI_SQUARE[35]
    same_uid = [(groups.of(f"u{i}", "a")[0], groups.of(f"u{i}", "b")[0]) for i in range(36_000)]
    assert chi_square(Counter(same_uid), 36) < CHI_SQUARE[35]


def test_another_seed_assigns_anew() -> None:
    one, two = Groups([ETHNICITY, GENDER]), Groups([ETHNICITY, GENDER], seed=1)
    pairs = Counter((one.of(f"u{i}", "k")[0], two.of(f"u{i}", "k")[0]) for i in range(36_000))
    assert chi_square(pairs, 36) < CHI_SQUARE[35]


FIX = 'for example: groups = [["Black", "white", "Asian"], ["man", "woman"]]'


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ([], f"'groups' has no attribute\n  fix: {FIX}"),
        ([["man"], []], f"'groups[1]' has no values\n  fix: {FIX}"),
        ({"age": []}, f"'groups.age' has no values\n  fix: {FIX}"),
        ([["man", " "]], f"'groups[0]' has a value that is not plain text on one line\n  fix: {FIX}"),
        ([["a\nb"]], f"'groups[0]' has a value that is not plain text on one line\n  fix: {FIX}"),
        ([["man", "Man"]], "'groups[0]' has a value twice\n  fix: give each value once: all are equally likely"),
    ],
)
def test_bad_attributes_are_refused(attributes: list[list[str]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Groups(attributes)
    assert str(caught.value) == message
