import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.reference.similarity_swap import ratio_draws

from lamella.errors import LamellaError
from lamella.statistics import (
    RESAMPLES,
    contrast,
    holm,
    mean_intervals,
    paired_interval,
    perplexity,
    ratio_interval,
    spearman,
)


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


def test_the_p_value_belongs_to_the_interval():
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.03, 0.06, 0.1, 0.2):
        first = (generator.random((3, 200)) < 0.6 + shift).astype(float)
        second = (generator.random((3, 200)) < 0.6).astype(float)
        actual = paired_interval(first, second, resamples=4000)
        assert (actual.p_value < 0.05) == (actual.low > 0 or actual.high < 0)
        assert paired_interval(second, first, resamples=4000).p_value == actual.p_value
    assert paired_interval(first, first).p_value == 1.0
    assert paired_interval(np.ones(50), np.zeros(50), resamples=999).p_value == 2 / 1000


def test_without_a_difference_the_p_value_is_rarely_small():
    generator = np.random.default_rng(1)
    values = [
        paired_interval(*(generator.random((2, 1, 100)) < 0.7), resamples=400, seed=i).p_value for i in range(400)
    ]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_rank_correlations_of_rows_are_scipys():
    generator = np.random.default_rng(1)
    first, second = generator.integers(0, 3, (2, 30, 5)).astype(float)
    first[0] = 1.0
    slow = [spearmanr(one, other).statistic for one, other in zip(first, second, strict=True)]
    assert np.isnan(slow[0])
    assert spearman(first, second) == pytest.approx(np.asarray(slow), nan_ok=True)
    against_one = [spearmanr(one, second[0]).statistic for one in first]
    assert spearman(first, second[:1]) == pytest.approx(np.asarray(against_one), nan_ok=True)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def by_seed(values):
    return dict(enumerate(values))


def test_contrasts_of_a_table_are_those_of_each_pair_alone():
    generator = np.random.default_rng(5)
    a, b, noise = generator.normal(size=(3, 3, 60))
    scores = {"a": a, "b": b + 2, "c": a + 0.1 * (noise - noise.mean())}

    actual = contrast({name: by_seed(own) for name, own in scores.items()}, [("b", "a"), ("c", "a"), ("b", "c")])

    alone = [paired_interval(scores[first], scores[second]) for first, second in (("b", "a"), ("c", "a"), ("b", "c"))]
    assert [one.p_value for one in actual] == pytest.approx(holm([one.p_value for one in alone]))
    for one, interval in zip(actual, alone, strict=True):
        assert one.interval.resamples == RESAMPLES
        assert (one.interval.difference, one.interval.low, one.interval.high) == pytest.approx(
            (interval.difference, interval.low, interval.high)
        )
        assert (one.seeds, one.examples) == (3, 60)
    assert [one.significant for one in actual] == [True, False, True]


def test_only_shared_seeds_are_compared_and_paired():
    scores = {"a": {0: [1, 0], 1: [0, 0]}, "b": {1: [1, 1], 2: [0, 0]}, "c": {2: [1, 0]}, "d": {}}

    actual = contrast(scores, [("b", "a"), ("c", "a"), ("c", "b"), ("d", "a"), ("unknown", "a")])

    assert [(one.first, one.second, one.seeds, one.interval.difference) for one in actual] == [
        ("b", "a", 1, 1.0),
        ("c", "b", 1, 0.5),
    ]
    assert contrast(scores, []) == []


def test_equal_methods_differ_by_nothing_whatever_stands_beside_them():
    scores = {name: by_seed(np.random.default_rng(6).normal(size=(2, 37))) for name in "ab"}
    scores["c"] = by_seed(np.random.default_rng(7).normal(size=(2, 37)))

    same, _ = contrast(scores, [("a", "b"), ("c", "b")])

    assert (same.interval.low, same.interval.high, same.interval.p_value) == (0.0, 0.0, 1.0)


def test_unlike_examples_are_refused():
    with pytest.raises(LamellaError, match="some have 2 scores and some 3"):
        contrast({"a": {0: [1, 2]}, "b": {0: [1, 2, 3]}}, [("a", "b")])


def test_intervals_of_means_are_those_of_differences_from_zero():
    generator = np.random.default_rng(8)
    scores = {"a": generator.normal(size=(3, 50)), "b": generator.normal(size=(1, 50)), "floor": np.ones((1, 20))}

    actual = mean_intervals({**{name: by_seed(own) for name, own in scores.items()}, "nothing": {}})

    for name, own in scores.items():
        alone = paired_interval(own, np.zeros_like(own))
        assert actual[name] == pytest.approx((alone.low, alone.high))
    assert list(actual) == ["a", "b", "floor"]


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert perplexity(1e6, 1) == math.inf


def test_perplexity_of_nothing_is_refused():
    with pytest.raises(LamellaError, match="at least one predicted token"):
        perplexity(0.0, 0)


def test_intervals_of_nothing_are_refused():
    nothing = {0: np.zeros(0)}
    with pytest.raises(LamellaError, match="scores of examples, and here are none"):
        contrast({"a": nothing, "b": nothing}, [("a", "b")])
    with pytest.raises(LamellaError, match="scores of examples, and here are none"):
        mean_intervals({"a": nothing})
    with pytest.raises(LamellaError, match="at least one text with tokens"):
        ratio_interval(np.zeros(2), np.zeros(2))


def test_a_ratio_is_that_of_drawing_texts_and_dividing():
    generator = np.random.default_rng(0)
    weights = generator.integers(1, 40, 30).astype(float)
    difference = weights * generator.normal(0.1, 0.3, 30)
    actual = ratio_interval(difference, weights, resamples=20_000)
    assert actual.difference == pytest.approx(difference.sum() / weights.sum())
    draws = ratio_draws(torch.from_numpy(difference), torch.from_numpy(weights), 20_000, seed=1)
    low, high = np.quantile(draws.numpy(), [0.025, 0.975])
    assert actual.low == pytest.approx(low, abs=0.005)
    assert actual.high == pytest.approx(high, abs=0.005)
    below = 2 * (draws <= 0).double().mean().item()
    assert actual.p_value == pytest.approx(below, abs=0.02)


def test_a_ratio_with_equal_weights_is_the_paired_interval():
    difference = np.random.default_rng(1).normal(0.1, 0.3, 25)
    actual = ratio_interval(difference, np.ones(25), resamples=20_000, level=0.9)
    expected = paired_interval(difference, np.zeros(25), resamples=20_000, level=0.9, seed=5)
    assert actual.difference == pytest.approx(expected.difference)
    assert actual.low == pytest.approx(expected.low, abs=0.005)
    assert actual.high == pytest.approx(expected.high, abs=0.005)


def test_texts_without_predicted_tokens_do_not_break_the_interval():
    actual = ratio_interval(np.array([0.0, 0.0, 2.0]), np.array([0.0, 0.0, 4.0]), resamples=200)
    assert (actual.difference, actual.low, actual.high) == (0.5, 0.5, 0.5)
    assert actual.resamples < 200  # draws of empty texts alone


def test_tasks_count_alike_and_examples_are_drawn_within_them():
    scores = [1.0] * 10 + [0.0] * 90
    other = [1.0] * 10 + [0.0, 1.0] * 45

    assert mean_intervals({"a": {0: scores}}, [10, 90]) == {"a": pytest.approx((0.5, 0.5))}
    (found,) = contrast({"a": {0: other}, "b": {0: scores}}, [("a", "b")], [10, 90])
    assert found.interval.difference == pytest.approx(0.25)
    # of the second task alone, drawn 90 times, and half of the mean
    (alone,) = contrast({"a": {0: other[10:]}, "b": {0: scores[10:]}}, [("a", "b")])
    assert found.interval.low == pytest.approx(alone.interval.low / 2, abs=0.01)
    assert found.interval.high == pytest.approx(alone.interval.high / 2, abs=0.01)
    with pytest.raises(LamellaError, match="99 examples, and 100 are scored"):
        contrast({"a": {0: other}, "b": {0: scores}}, [("a", "b")], [10, 89])


def test_one_task_is_no_stratum():
    scores = {"a": {0: [1.0, 0.0, 1.0, 1.0]}, "b": {0: [0.0, 0.0, 1.0, 0.0]}}

    assert contrast(scores, [("a", "b")]) == contrast(scores, [("a", "b")], [4])
