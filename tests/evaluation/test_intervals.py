import numpy as np
import pytest

from lamella.errors import LamellaError
from lamella.evaluation.intervals import paired_interval


def test_equal_scores_have_an_interval_of_zero():
    scores = np.random.default_rng(0).integers(0, 2, (2, 50))

    interval = paired_interval(scores, scores)

    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_a_constant_gain_is_certain_and_the_sign_is_first_minus_second():
    interval = paired_interval(np.ones((2, 30)), np.zeros((2, 30)))

    assert (interval.difference, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_the_width_is_that_of_the_normal_approximation_with_one_seed():
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=400), generator.normal(size=400)

    interval = paired_interval(first, second, seed=3)

    error = np.std(first - second) / np.sqrt(400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_disagreeing_seeds_widen_the_interval():
    agreeing = np.tile(np.random.default_rng(2).normal(size=200), (2, 1))
    disagreeing = agreeing + np.array([[0.5], [-0.5]])
    zeros = np.zeros_like(agreeing)

    narrow, wide = paired_interval(agreeing, zeros), paired_interval(disagreeing, zeros)

    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_pairing_is_used():
    """Two methods that fail on the same examples differ more surely than two that fail anywhere."""
    hard = np.random.default_rng(3).normal(size=300)

    paired = paired_interval(hard + 0.1, hard)

    assert paired.low == pytest.approx(0.1)


def test_the_draws_follow_the_seed():
    scores = np.random.default_rng(4).normal(size=(2, 40))

    assert paired_interval(scores, 0 * scores, seed=1) == paired_interval(scores, 0 * scores, seed=1)
    assert paired_interval(scores, 0 * scores, seed=1) != paired_interval(scores, 0 * scores, seed=2)


def test_unlike_shapes_are_refused():
    with pytest.raises(LamellaError, match=r"\(1, 3\) and \(1, 4\)"):
        paired_interval(np.zeros(3), np.zeros(4))
