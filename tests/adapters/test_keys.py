"""What the index holds of a LoRA, and the scores made from it, are those of whole weight matrices."""

import pytest
import torch
from tests.reference import retrieval

from lamella import LamellaError
from lamella.adapters.directions import directions
from lamella.adapters.keys import key_named, retrieval_keys
from lamella.adapters.source import Factors


def lora(seed, r=3, width=10, out=7):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator), 1.5)


LORAS = [lora(seed) for seed in range(4)]
HELD = torch.stack([directions(one) for one in LORAS])
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("shape", [{}, {"r": 9}, {"r": 12, "width": 5}])
def test_directions_are_as_long_as_the_singular_values_and_orthogonal(shape):
    one = lora(0, **shape)
    found = directions(one).double()
    delta = one.scaling * one.B.double() @ one.A.double()
    torch.testing.assert_close(found.t() @ found, delta.t() @ delta, rtol=1e-4, atol=1e-4)
    lengths = found.norm(dim=1)
    values = torch.linalg.svdvals(delta)
    torch.testing.assert_close(lengths[: len(values)], values[: len(lengths)], rtol=1e-4, atol=1e-4)
    assert bool((lengths.diff() <= 1e-6).all())


def test_spectrum_is_the_length_of_what_a_lora_puts_out():
    expected = [[retrieval.spectrum(x, one.A, one.B, one.scaling) for one in LORAS] for x in X]
    torch.testing.assert_close(key_named("spectrum").scorer(HELD)(X), torch.tensor(expected))


def test_arrow_is_the_cosine_with_the_strongest_direction():
    expected = [[retrieval.arrow(x, one.A, one.B) for one in LORAS] for x in X]
    torch.testing.assert_close(key_named("arrow").scorer(HELD)(X), torch.tensor(expected))


def test_centroids_take_the_nearest_and_rows_of_zeros_count_for_nothing():
    middles = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2))
    middles[1, 2:] = 0
    found = key_named("centroids").scorer(middles)(X)
    expected = [[retrieval.centroids(x, one[one.any(dim=1)]) for one in middles] for x in X]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not key_named("centroids").scorer(torch.zeros(2, 1, 10))(X).any()


def test_another_key_is_refused_with_those_that_there_are():
    with pytest.raises(LamellaError, match="'magic' is not one of arrow, centroids, spectrum, text"):
        key_named("magic")
    assert retrieval_keys() == ["arrow", "centroids", "spectrum", "text"]
