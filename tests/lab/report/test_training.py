import pandas as pd
import pytest

from lamella.errors import LamellaError
from lamella.lab.report.training import training_charts


def test_entropy_has_a_line_per_run_on_an_axis_up_to_one(entropy):
    (chart,) = training_charts(entropy)
    assert [line.name for line in chart.lines] == ["MoLA, seed 0", "MoLA, seed 1"]
    assert chart.y_ticks[-1][1] == "1"


def test_balance_and_dead_experts_are_drawn_where_they_were_logged(entropy):
    charts = training_charts(entropy.assign(balance=1.2, dead_experts=0))
    assert [chart.title for chart in charts] == [
        "Entropy, as a share of its maximum",
        "Balance, E · Σ weight²: 1 is even use",
        "Dead experts",
    ]
    assert len(training_charts(entropy.assign(balance=float("nan")))) == 1


def test_an_empty_log_shows_nothing_and_a_wrong_one_is_refused(entropy):
    assert training_charts(entropy.head(0)) == ()
    with pytest.raises(LamellaError, match="lacks the columns run"):
        training_charts(pd.DataFrame({"step": [1], "entropy": [0.5]}))
