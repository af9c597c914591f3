import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.lab.report.axis import count_axis, round_axis


def test_round_ends_hold_the_values():
    axis = round_axis([0.74, 0.9])
    assert (axis.low, axis.high) == (0.7, 0.9)
    assert axis.marks()[0] == (3.0, "0.7")
    assert axis.at(0.9) == 97.0


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0, 11], (0, 5, 10)), ([0, 600], (0, 200, 400, 600)), ([3, 3], (3,)), ([4, 5], (4, 5)), ([7, 20], (10, 15, 20))],
)
def test_a_count_axis_has_whole_ticks_between_its_ends(values, ticks):
    axis = count_axis(values)
    assert axis.ticks == ticks
    assert all(3 <= axis.at(value) <= 97 for value in (*values, *ticks))


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=5))
def test_every_count_is_on_the_axis(values):
    axis = count_axis(values)
    assert all(3 <= axis.at(value) <= 97 for value in values)
    assert 0 <= len(axis.ticks) <= 8
    assert all(float(tick).is_integer() for tick in axis.ticks)
