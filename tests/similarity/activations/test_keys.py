"""The hash that keys are made by."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import similarity_capture as reference

from lamella.similarity.activations.keys import hashed, unit

WORDS = st.integers(-(2**63), 2**63 - 1)


def test_splitmix_is_the_published_one():
    # first outputs of SplitMix64 from state 1234567, as its authors' code prints them
    state = 1234567
    for expected in (6457827717110365317, 3203168211198807973):
        assert reference.splitmix(state) == expected
        state = (state + 0x9E3779B97F4A7C15) % 2**64


@given(st.lists(WORDS, min_size=1, max_size=5))
def test_it_is_the_reference_in_pythons_integers(words):
    assert int(hashed(*(torch.tensor(word) for word in words))) == reference.key(*words)
    assert int(hashed(*words[:-1], torch.tensor(words[-1]))) == reference.key(*words)


def test_the_order_of_words_and_their_number_count():
    two = torch.tensor(2)
    assert len({int(hashed(1, two)), int(hashed(two, 1)), int(hashed(two)), int(hashed(0, 1, two))}) == 4


def test_neighbouring_words_are_spread_evenly():
    share = unit(hashed(3, torch.arange(100_000)))
    counts = torch.histc(share, bins=100, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, standard deviation 14
    assert share.min() >= 0
    assert share.max() < 1
