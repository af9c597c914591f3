import math

import numpy as np
import pandas as pd
import pytest

from lamella.lab.report.formatting import as_interval, is_missing, number_format, number_text, setting_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8734, "0.873"),
        (-0.0121, "-0.012"),
        (0.0, "0.000"),
        (12.314, "12.31"),
        (812.44, "812.4"),
        (2304112, "2,304,112"),
        (2304112.4, "2,304,112"),
        (0.00042, "0.00042"),
        (3e-7, "3e-07"),
        (7, "7"),
        (np.float32(0.5), "0.500"),
        (np.int64(1200), "1,200"),
        (math.inf, "inf"),
    ],
)
def test_a_number_keeps_about_four_digits(value, text):
    assert number_text(value) == text


def test_counts_stay_counts_beside_a_missing_cell():
    assert number_format([8.0, math.nan, 16.0])(8.0) == "8"
    assert number_format([1.0, 0.0])(1.0) == "1.000"
    assert number_format([8.0, 0.5])(8.0) == "8.000"


@pytest.mark.parametrize("value", [None, math.nan, pd.NA, pd.NaT, (None, None), (), [math.nan, math.nan]])
def test_missing(value):
    assert is_missing(value)


@pytest.mark.parametrize("value", [0, 0.0, "", False, (0.1, 0.2), {}])
def test_not_missing(value):
    assert not is_missing(value)


def test_an_interval_is_a_pair_of_numbers():
    assert as_interval(np.array([0.1, 0.2])) == (0.1, 0.2)
    assert as_interval([0.1, math.nan]) is None
    assert as_interval((0.1, 0.2, 0.3)) is None
    assert as_interval("ab") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (1e-3, "0.001"),
        ([2, 4, 6], "2, 4, 6"),
        ({"q", "k"}, "k, q"),
        ([], "empty"),
        ({}, "empty"),
        ([{"a": 1}, {"b": None}], "(a: 1), (b: none)"),
        ("text", "text"),
    ],
)
def test_settings_read_as_they_were_written(value, text):
    assert setting_text(value) == text
