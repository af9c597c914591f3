from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.errors import LamellaError
from lamella.lab.report.curves import line_chart, require_columns, spread, thinned


def frame(**runs):
    rows = [(name, step, value) for name, values in runs.items() for step, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["run", "step", "entropy"])


def test_lines_have_a_path_an_end_a_label_and_words():
    chart = line_chart(frame(a=[1.0, 0.8], b=[1.0, 0.0]), "run", "step", "entropy", "Entropy")
    first, second = chart.lines
    assert (first.path, second.path) == ("M3.0 3.0L97.0 21.8", "M3.0 3.0L97.0 97.0")
    assert (first.end, second.end) == ((97.0, 21.8), (97.0, 97.0))
    assert (first.label, first.last, first.style, second.style) == (21.8, "0.800", 0, 1)
    assert second.label < 97.0  # inside the chart, whole
    assert first.words == "a: 1.000 at 0, 0.800 at 1"
    assert (chart.across, chart.title) == ("step", "Entropy")
    assert [text for _, text in chart.y_ticks] == ["0", "0.5", "1"]


def test_rows_without_a_value_are_left_out_and_points_are_put_in_order():
    rows = pd.DataFrame({"run": "a", "step": [2, 1, 0], "entropy": [0.0, np.nan, 1.0]})
    (line,) = line_chart(rows, "run", "step", "entropy", "Entropy").lines
    assert line.path == "M3.0 3.0L97.0 97.0"
    assert line_chart(rows.assign(entropy=np.nan), "run", "step", "entropy", "Entropy") is None


def test_a_distribution_is_labelled_by_where_it_is_highest():
    rows = pd.DataFrame({"layer": ["layer 0"] * 3, "norm": [1.5, 2.5, 3.5], "share": [0.2, 0.7, 0.1]})
    (line,) = line_chart(rows, "layer", "norm", "share", "Norms", distribution=True).lines
    assert (line.last, line.words) == ("2.500", "layer 0: most at 2.500")


def test_a_single_point_is_drawn():
    (line,) = line_chart(frame(a=[0.5]), "run", "step", "entropy", "Entropy").lines
    assert line.path == "M50.0 50.0h0.01"


def test_the_axis_reaches_the_values_asked_for():
    chart = line_chart(frame(a=[0.8, 0.9]), "run", "step", "entropy", "Entropy", reach=(0.0, 1.0))
    assert (chart.y_ticks[0][1], chart.y_ticks[-1][1]) == ("0", "1")


def test_many_lines_make_a_taller_chart():
    few, many = (
        line_chart(frame(**{f"run {at}": [1.0, 0.5] for at in range(runs)}), "run", "step", "entropy", "Entropy")
        for runs in (2, 40)
    )
    assert many.height > few.height
    gap = 100 * 18 / many.height
    labels = sorted(line.label for line in many.lines)
    assert all(after - before >= gap - 0.02 for before, after in pairwise(labels))
    assert labels[0] >= 0
    assert labels[-1] <= 100


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10))
def test_spread_keeps_order_and_distance(places):
    moved = spread(places, 10.0)
    by_place = [moved[at] for at in sorted(range(len(places)), key=lambda at: places[at])]
    assert by_place == sorted(by_place)
    assert all(after - before >= 9.98 for before, after in pairwise(by_place))
    assert by_place[0] >= 4.99
    assert by_place[-1] <= 95.01


def test_spread_leaves_what_stands_apart():
    assert spread([50.0, 20.0], 10.0) == [50.0, 20.0]


def test_thinning_keeps_ends_and_spikes():
    values = np.zeros(10_000)
    values[1234], values[7777] = 5.0, -5.0
    kept = thinned(values)
    assert len(kept) <= 402
    assert {0, 1234, 7777, 9999} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(np.zeros(400)) == list(range(400))


def test_a_missing_column_is_named():
    with pytest.raises(LamellaError, match="table of entropy lacks the columns run, step"):
        require_columns(pd.DataFrame({"entropy": []}), ("run", "step", "entropy"), "entropy")
