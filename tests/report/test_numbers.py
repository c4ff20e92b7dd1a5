from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medkd.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8124, "0.812"),
        (-0.0002, "0.000"),
        (-0.034, "−0.034"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "n/a"),
        (None, "–"),
        (12345.0, "12\u202f345.000"),
    ],
)
def test_fixed_decimals(value, text):
    assert numbers.fixed(value, 3) == text


def test_interval_is_left_out_where_there_is_none():
    assert numbers.interval(0.812, 0.79, 0.831, 3) == "0.812 [0.790, 0.831]"
    assert numbers.interval(0.812, math.nan, math.nan, 3) == "0.812"
    assert numbers.interval(0.812, None, None, 3) == "0.812"


@pytest.mark.parametrize(("value", "text"), [(0.02, "+0.020"), (-0.02, "−0.020"), (0.0001, "0.000"), (None, "–")])
def test_differences_carry_their_sign(value, text):
    assert numbers.signed(value, 3) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0004, "< 0.001"), (0.0312, "0.031"), (0.5, "0.50"), (math.nan, "n/a"), (None, "n/a")]
)
def test_p_values(value, text):
    assert numbers.p_value(value) == text


def test_a_column_has_one_unit_and_aligned_decimals():
    assert numbers.scaled_column([124_387_332, 484_000, None]) == (["124.387", "0.484", "–"], "M")
    assert numbers.scaled_column([900.0, 12.0]) == (["900", "12"], "")
    assert numbers.scaled_column([None]) == (["–"], "")
    assert numbers.scaled_column([0.0, None]) == (["0", "–"], "")


@given(st.lists(st.floats(1e-3, 1e15), min_size=1, max_size=6))
def test_every_entry_of_a_column_has_the_same_decimals(values):
    texts, _ = numbers.scaled_column(values)
    assert len({len(text.partition(".")[2]) for text in texts}) == 1


def test_ratios_and_sizes():
    assert numbers.ratio(124_387_332, 484_000) == "257×"
    assert numbers.ratio(3.4, 1) == "3.4×"
    assert numbers.si(484_000) == "484 k"
    assert numbers.si(7) == "7"
    assert numbers.count(1, "patient") == "1 patient"
    assert numbers.count(2000, "class", "classes") == "2\u202f000 classes"
