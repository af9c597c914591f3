import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from lamella.errors import LamellaError
from lamella.lab.runs.metrics import accuracy, macro_f1, matthews, metric_for, pearson, spearman

classes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=50)
@given(classes)
def test_class_metrics_are_those_of_scikit_learn(pairs):
    predictions, labels = (np.array(column) for column in zip(*pairs, strict=True))

    assert accuracy(predictions, labels) == pytest.approx(oracle.accuracy_score(labels, predictions))
    assert macro_f1(predictions, labels) == pytest.approx(oracle.f1_score(labels, predictions, average="macro"))
    assert matthews(predictions, labels) == pytest.approx(oracle.matthews_corrcoef(labels, predictions), abs=1e-9)


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
