import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import similarity_screen as reference

from lamella.similarity.screening.measures import centred, linear_cka


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka(first, second):
    everything = torch.ones(len(first), 1, dtype=torch.bool)
    return float(linear_cka(centred(first, everything), centred(second, everything)))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_both_forms_are_that_of_centred_gram_matrices(tokens, one, two, seed):
    first, second = drawn(tokens, one, seed=seed), drawn(tokens, two, seed=seed + 1)
    assert cka(first, second) == pytest.approx(reference.cka(first, second), rel=1e-9)


@pytest.mark.parametrize("tokens", [6, 30])
def test_rotation_scale_and_shift_change_nothing(tokens):
    first, second = drawn(tokens, 8), drawn(tokens, 8, seed=1)
    rotation = torch.linalg.qr(drawn(8, 8, seed=2))[0]
    assert cka(first, 3 * first @ rotation + 5) == pytest.approx(1)
    assert cka(first @ rotation, second) == pytest.approx(cka(first, second))
    assert cka(second, first) == pytest.approx(cka(first, second))
    assert cka(first, second) < 0.9


def test_a_stretch_is_seen():
    first = drawn(30, 8)
    assert cka(first, first * torch.logspace(0, 3, 8)) < 0.9


def test_padded_tokens_do_not_count():
    first, second = drawn(5, 8), drawn(5, 8, seed=1)
    real = torch.tensor([True] * 5 + [False] * 3)[:, None]
    padded = [torch.cat([rows, torch.full((3, 8), 99.0)]) for rows in (first, second)]
    value = linear_cka(*(centred(rows, real) for rows in padded))
    assert float(value) == pytest.approx(cka(first, second))
