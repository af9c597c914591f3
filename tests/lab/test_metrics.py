import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lamella.errors import LamellaError
from lamella.lab.metrics import accuracy, macro_f1, matthews, metric_for, pearson, spearman

classes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=25)
@given(classes)
def test_class_metrics_are_those_of_their_definitions(pairs):
    predictions, labels = (np.array(column) for column in zip(*pairs, strict=True))
    values = sorted({value for pair in pairs for value in pair})
    count = [(sum(p == y == v for p, y in pairs), sum((p == v) + (y == v) for p, y in pairs)) for v in values]
    f1 = [2 * hits / occurrences for hits, occurrences in count]
    # the correlation of all indicators of a class (Gorodkin 2004)
    indicators = [side[:, None] == values for side in (predictions, labels)]
    predicted, actual = (side - side.mean(0) for side in indicators)
    spread = math.sqrt((predicted**2).sum() * (actual**2).sum())

    assert accuracy(predictions, labels) == pytest.approx(sum(p == y for p, y in pairs) / len(pairs))
    assert macro_f1(predictions, labels) == pytest.approx(sum(f1) / len(f1))
    assert matthews(predictions, labels) == pytest.approx((predicted * actual).sum() / (spread or 1.0), abs=1e-9)


def test_correlations_are_those_of_scipy():
    generator = np.random.default_rng(0)
    x = generator.normal(size=50)
    y = np.round(x + generator.normal(size=50), 1)  # rounding makes ties

    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_constant_side_correlates_with_nothing():
    assert pearson(np.ones(4), np.arange(4)) == 0.0
    assert matthews(np.ones(4, int), np.arange(4)) == 0.0


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(LamellaError, match="Did you mean 'matthews'"):
        metric_for("mathews")
