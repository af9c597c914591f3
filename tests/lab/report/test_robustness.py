import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tests.lab.report.test_report import HOSTILE, Page

from lamella.errors import LamellaError
from lamella.lab.report import render
from lamella.lab.report.robustness import robustness_view


@pytest.fixture
def scores():
    """Two methods, three strengths, two seeds: MoLEx falls from 0.9 by half the strength, LoRA by all of it."""
    rows = [
        (method, "embedding", strength, seed, metric, size * (0.9 - slope * strength - 0.1 * seed * strength))
        for method, slope in (("molex", 0.5), ("lora", 1.0))
        for strength in (0.0, 0.1, 0.5)
        for seed in (0, 1)
        for metric, size in (("accuracy", 1.0), ("loss", 3.0))
    ]
    return pd.DataFrame(rows, columns=["method", "noise", "strength", "seed", "metric", "value"])


@pytest.fixture
def differences():
    rows = [("lora", "molex", strength, "accuracy", -strength, -2 * strength, 0.01, 0.2) for strength in (0.1, 0.5)]
    return pd.DataFrame(rows, columns=["method", "against", "strength", "measure", "difference", "low", "high", "p"])


def test_a_chart_per_metric_with_a_line_per_method_and_whiskers_over_seeds(scores, differences):
    view = robustness_view(scores, differences)
    assert [chart.title for chart in view.charts] == ["accuracy", "loss"]
    chart = view.charts[0]
    assert chart.across == "strength of the noise (embedding)"
    assert [line.name for line in chart.lines] == ["molex", "lora"]
    assert len({line.style for line in chart.lines}) == 2
    assert [text for _, text in chart.x_ticks] == ["0", "0.2", "0.4", "0.6"]
    molex = chart.lines[0]
    assert molex.words == "molex: 0.900 at 0, 0.625 at 0.5"
    lefts, tops, bottoms = np.array(molex.whiskers).T
    assert sorted(lefts) == list(lefts)
    assert tops[0] == bottoms[0]  # without noise all seeds agree
    assert (tops[1:] < bottoms[1:]).all()
    # the mean stands in the middle of two seeds
    places = np.array([point.split(" ") for point in molex.path[1:].split("L")], float)
    np.testing.assert_allclose(places[:, 0], lefts)
    np.testing.assert_allclose(places[:, 1], (tops + bottoms) / 2, atol=0.02)
    spread = (bottoms - tops) * (float(chart.y_ticks[-1][1]) - float(chart.y_ticks[0][1])) / 94
    np.testing.assert_allclose(spread, [0.0, 0.01, 0.05], atol=1e-3)


def test_differences_are_a_table(scores, differences):
    table = robustness_view(scores, differences).differences
    assert [head.text for head in table.columns] == [
        *("method", "against", "strength", "measure", "difference", "interval", "p")
    ]
    assert [cell.text for cell in table.rows[1]] == [
        *("lora", "molex", "0.500", "accuracy", "-0.500", "-1.000 to 0.010", "0.200")
    ]
    assert robustness_view(scores).differences is None
    assert robustness_view(scores, differences.head(0)).differences is None


def test_infinite_values_are_left_out(scores):
    scores.loc[scores["strength"] == 0.5, "value"] = np.inf
    for line in robustness_view(scores).charts[0].lines:
        assert len(line.whiskers) == 2


def test_the_page_shows_it_in_its_place(report, scores, differences):
    page = Page(render(replace(report, robustness=scores, robustness_differences=differences)))
    headings = [attrs["id"] for attrs in page.named("h2")]
    assert headings == ["summary", "results", "cost", "routing", "robustness", "findings", "settings", "notes"]
    assert [attrs["href"] for attrs in page.named("a")] == [f"#{name}" for name in headings[1:]]
    assert sum("whisker" in attrs.get("class", "") for attrs in page.named("line")) == 2 * 2 * 3
    assert all({"aria-hidden", "role"} & set(attrs) or "overflow" in attrs or not attrs for attrs in page.named("svg"))
    text = " ".join(" ".join(page.text).split())
    assert "whiskers reach from the lowest to the highest seed" in text
    assert "0.625 molex" in text
    # lines differ by their dashes and names too
    dashes = {attrs["class"] for attrs in page.named("path") if attrs.get("class", "").startswith("line ")}
    assert dashes == {"line stroke0 dash0", "line stroke1 dash1"}


def test_hostile_names_stay_text(report, scores, differences):
    named = {"robustness": scores.assign(method=HOSTILE, metric=HOSTILE, noise=HOSTILE)}
    page = render(replace(report, **named, robustness_differences=differences.assign(method=HOSTILE, measure=HOSTILE)))
    assert Page(page).named("script") == []
    assert Page(page).named("img") == []
    assert not re.search(r"<script|onerror=alert\(2\)>", page)


def test_nothing_to_show_and_columns_that_are_missing(scores, differences):
    assert robustness_view(scores.head(0)) is None
    with pytest.raises(LamellaError, match="scores under noise lacks the columns method"):
        robustness_view(scores.drop(columns="method"))
    with pytest.raises(LamellaError, match="differences under noise lacks the columns p"):
        robustness_view(scores, differences.drop(columns="p"))
