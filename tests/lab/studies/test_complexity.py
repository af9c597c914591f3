import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lamella.errors import LamellaError
from lamella.lab.studies.complexity import (
    Rarity,
    chosen_depth,
    clause_depth,
    complexity,
    depth_correlations,
    rank_correlation,
    readability,
    syllables,
    words_of,
)


def test_words_are_letters_with_their_apostrophes():
    assert words_of("Don't stop: 3 Caf\u00e9s, o\u2019clock!") == ["don't", "stop", "caf\u00e9s", "o\u2019clock"]


@pytest.mark.parametrize(
    ("word", "count"),
    [("make", 1), ("whale", 1), ("table", 2), ("tree", 1), ("the", 1), ("readability", 5), ("rhythm", 1), ("nth", 1)],
)
def test_syllables_are_vowel_runs_without_a_silent_e(word, count):
    assert syllables(word) == count


def test_readability_is_the_flesch_kincaid_grade():
    text = "The cat sat. A table was readable."
    assert sum(map(syllables, words_of(text))) == 10
    assert readability(text) == pytest.approx(0.39 * 7 / 2 + 11.8 * 10 / 7 - 15.59)
    assert math.isnan(readability("42 !"))


def test_an_abbreviation_inside_a_word_ends_no_sentence():
    assert readability("One of U.S origin") == pytest.approx(0.39 * 5 + 11.8 * 7 / 5 - 15.59)


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("", 0),
        ("The dog barks.", 0),
        ("Who is the dog?", 0),  # a question's first word opens nothing
        ("The dog that barks is mine.", 1),
        ("What is the dog that chased the cat that ate?", 2),
        ("The dog that barks, the cat that purrs", 1),
        ("He said that if it rains - which it does - we stay.", 2),
        ("A (b [c] d) e", 2),
        ("I left (because he knew who lied) early", 3),
        ("This ends that. That begins if it can", 1),
        ("a ) b ] c", 0),
        ("well-known", 0),
    ],
)
def test_clause_depth_counts_what_is_open_at_once(text, depth):
    assert clause_depth(text) == depth


def test_rarity_is_the_mean_surprise_of_the_words_in_the_corpus():
    rarity = Rarity(["a a b", "A c"])  # a 3, b 1, c 1: 5 words, 3 distinct

    assert rarity("a B") == pytest.approx(-(math.log(4 / 9) + math.log(2 / 9)) / 2)
    assert rarity("unseen") == pytest.approx(-math.log(1 / 9))
    assert math.isnan(rarity("7"))
    with pytest.raises(LamellaError, match="no words"):
        Rarity(["1", ""])


def test_complexity_has_a_line_per_text():
    frame = complexity(["a dog", "the dog that barks"], ["a dog barks"])

    assert list(frame.columns) == ["length", "rarity", "readability", "depth"]
    assert frame["length"].tolist() == [2, 4]
    assert frame["depth"].tolist() == [0, 1]
    assert frame.loc[1, "rarity"] > frame.loc[0, "rarity"]
    assert complexity(["a dog"], ["a"], lengths=[5])["length"].tolist() == [5]
    with pytest.raises(LamellaError, match="one length each"):
        complexity(["a", "b"], ["a"], lengths=[1])


numbers = st.lists(st.integers(-3, 3), min_size=8, max_size=30)


@given(numbers, st.randoms(use_true_random=False))
def test_rank_correlation_is_scipys(values, random):
    other = values.copy()
    random.shuffle(other)
    found = rank_correlation(values, other, resamples=20)
    if len(set(values)) == 1:
        assert (found.rho, found.p_value) == (0.0, 1.0)
    else:
        assert found.rho == pytest.approx(spearmanr(values, other).statistic, abs=1e-12)
    assert found.count == len(values)


def test_interval_and_p_value_are_near_the_textbooks():
    generator = np.random.default_rng(1)
    x = generator.normal(size=200)
    y = 0.25 * x + generator.normal(size=200)
    found = rank_correlation(x, y)

    exact = spearmanr(x, y)
    assert found.p_value == pytest.approx(exact.pvalue, abs=0.01)
    assert found.low < found.rho < found.high
    # Fisher's z with the variance for ranks (Bonett & Wright 2000)
    half = 1.96 * math.sqrt((1 + found.rho**2 / 2) / 197)
    assert found.low == pytest.approx(math.tanh(math.atanh(found.rho) - half), abs=0.05)
    assert found.high == pytest.approx(math.tanh(math.atanh(found.rho) + half), abs=0.05)
    assert rank_correlation(x, y) == found  # the same draws every time
    assert rank_correlation(x, generator.normal(size=200)).p_value > 0.01


def test_pairs_without_a_value_are_left_out():
    found = rank_correlation([1, 2, 3, np.nan, 5], [2, 4, 6, 0, np.inf], resamples=50)

    assert (found.rho, found.count) == (pytest.approx(1.0), 3)
    for first, second in (([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([[1, 2, 3]], [[1, 2, 3]])):
        with pytest.raises(LamellaError):
            rank_correlation(first, second)


def decisions(chosen):
    rows = [(row, layer, tau) for row, taus in enumerate(chosen) for layer, tau in enumerate(taus)]
    return pd.DataFrame(rows, columns=["row", "layer", "chosen"])


def test_chosen_depth_is_the_mean_of_chosen_minus_layer():
    assert chosen_depth(decisions([[0, 1, 2], [2, 2, 2], [0, 0, 0]])).tolist() == [0, 1, -1]
    with pytest.raises(LamellaError, match="'chosen' is missing"):
        chosen_depth(decisions([[0]]).drop(columns="chosen"))
    with pytest.raises(LamellaError, match="two decisions"):
        chosen_depth(pd.concat([decisions([[0]])] * 2))


def test_depth_follows_complexity_under_the_policy_that_makes_it_so():
    generator = np.random.default_rng(0)
    measures = pd.DataFrame({"length": np.arange(60), "depth": generator.integers(3, size=60)})
    follows = decisions([[min(5, length // 10)] * 6 for length in range(60)])
    chance = decisions(generator.integers(6, size=(60, 6)))
    found = depth_correlations(measures, {"learned": follows, "random": chance}).set_index(["policy", "measure"])

    assert found.loc[("learned", "length"), "rho"] > 0.95
    assert found.loc[("learned", "length"), "p"] < 0.001
    assert found.loc[("random", "length"), "p"] > 0.05
    assert set(found["texts"]) == {60}
    with pytest.raises(LamellaError, match="'learned' name the text 60"):
        depth_correlations(measures, {"learned": decisions([[0]] * 61)})
