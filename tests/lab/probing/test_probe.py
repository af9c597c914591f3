"""Probes on representations in which it is known what is there."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lamella.lab.probing.probe import STRENGTHS, probe, right_on_test
from lamella.lab.probing.tasks import properties_of

WIDTH = 6


@pytest.fixture
def planted(sentences):
    """A property, and states of two layers: noise, and noise with the label in one direction."""
    one = next(one for one in properties_of(sentences, 200)[0] if one.name == "bigram shift")
    noise = np.random.default_rng(0).normal(size=(2, len(one.texts), WIDTH))
    noise[1, :, 2] += 6 * one.labels
    return one, noise


def test_what_is_planted_is_found_and_its_control_is_not(planted):
    one, states = planted
    found = probe(one, states)
    table = found.table.set_index("layer")
    assert list(table.index) == [-1, 0]
    assert table.loc[0, "accuracy"] > 0.95
    assert table.loc[0, "selectivity_low"] > 0
    assert abs(table.loc[-1, "accuracy"] - 0.5) < 0.25
    assert table.loc[-1, "selectivity_low"] < 0 < table.loc[-1, "selectivity_high"]
    assert found.best == 0
    assert [(beside.second, beside.significant) for beside in found.beside_the_best()] == [("-1", True)]


def test_a_table_is_the_means_over_rows_and_seeds(planted):
    one, states = planted
    found = probe(one, states, seeds=(3, 4))
    row = found.table.iloc[1]
    right, control = (np.stack(list(scores[0].values())) for scores in (found.right, found.control))
    assert right.shape == (2, len(one.parts["test"]))
    assert row["accuracy"] == pytest.approx(right.mean())
    assert row["selectivity"] == pytest.approx((right - control).mean())
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert row[["train", "validation", "test"]].tolist() == [len(rows) for rows in one.parts.values()]


def test_a_trend_is_the_rank_correlation_with_the_layer(planted):
    one, states = planted
    deeper = np.concatenate([states, states[1:]])
    deeper[2, :, 2] -= 3 * one.labels  # half of it is left
    rho, low, high = probe(one, deeper[[0, 2, 1]]).trend
    assert rho == 1.0
    assert low <= rho == high
    assert probe(one, deeper[[1, 2, 0]]).trend[0] == -1.0
    assert probe(one, np.zeros_like(deeper)).trend == (0.0, 0.0, 0.0)


def slow(states, labels, parts, seed):
    """Every strength fitted from nothing on what the seed draws; the first of the best on validation is tested."""
    rows = np.random.default_rng(seed).permutation(parts["train"])
    rows = rows[: round(0.75 * len(rows))]
    mean, deviation = states[rows].mean(axis=0), states[rows].std(axis=0)
    scaled = (states - mean) / deviation
    models = [LogisticRegression(C=one, max_iter=1000).fit(scaled[rows], labels[rows]) for one in STRENGTHS]
    scores = [(model.predict(scaled[parts["validation"]]) == labels[parts["validation"]]).mean() for model in models]
    return models[int(np.argmax(scores))].predict(scaled[parts["test"]]) == labels[parts["test"]]


@pytest.mark.parametrize("seed", range(3))
def test_a_probe_is_the_slow_one(planted, seed):
    one, states = planted
    faint = states[1] - 5 * np.eye(WIDTH)[2] * one.labels[:, None]
    assert (
        right_on_test(faint, one.labels, one.parts, seed).tolist() == slow(faint, one.labels, one.parts, seed).tolist()
    )


def test_nothing_is_chosen_on_the_test_rows(planted):
    """Other test labels change what is right, not what is predicted."""
    one, states = planted
    flipped = one.labels.copy()
    flipped[one.parts["test"]] = 1 - flipped[one.parts["test"]]
    right = right_on_test(states[1], one.labels, one.parts, 0)
    assert (right_on_test(states[1], flipped, one.parts, 0) == 1 - right).all()


def test_one_class_alone_is_predicted(planted):
    one, states = planted
    assert right_on_test(states[0], np.zeros_like(one.labels), one.parts, 0).all()
