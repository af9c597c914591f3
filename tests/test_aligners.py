"""The aligner between two spaces: its start, and its fit against least squares."""

import pytest
import torch

from lamella.aligners import Pairs, TwoWayAligner


def pairs_of(x: torch.Tensor, y: torch.Tensor) -> Pairs:
    pairs = Pairs(x.shape[1], y.shape[1])
    for part in range(0, len(x), 50):
        pairs.add(x[part : part + 50], y[part : part + 50])
    return pairs


def test_of_equal_sizes_it_starts_as_the_identity() -> None:
    aligner, x = TwoWayAligner(6, 6), torch.randn(3, 6)
    assert torch.equal(aligner.there(x), x)
    assert torch.equal(aligner.back(x), x)


@pytest.mark.parametrize(("here", "there"), [(5, 8), (8, 5)])
def test_of_other_sizes_it_starts_orthonormal(here: int, there: int) -> None:
    aligner = TwoWayAligner(here, there)
    down, up = aligner.down.weight.detach(), aligner.up.weight.detach()
    assert torch.equal(up, down.T)
    product = up @ down if here < there else down @ up
    torch.testing.assert_close(product, torch.eye(min(here, there)), atol=1e-6, rtol=0)


def test_fitted_it_regains_a_linear_map_and_its_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64) + 2
    weight = torch.linalg.qr(torch.randn(8, 5, generator=generator, dtype=torch.float64)).Q
    y = x @ weight.T + 3
    aligner, pairs = TwoWayAligner(5, 8).double(), pairs_of(x, y)
    before = aligner.unexplained(pairs)
    aligner.fit(pairs)
    torch.testing.assert_close(aligner.there(x), y, rtol=0, atol=0.02)
    torch.testing.assert_close(aligner.back(y - y[0]), x - x[0], rtol=0, atol=0.02)
    assert aligner.unexplained(pairs) < 1e-5 < before


def test_what_is_unexplained_is_the_residual_over_the_variance() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 4, generator=generator), torch.randn(300, 3, generator=generator)
    x[:, 0] += y[:, 0]
    fitted, held_out = pairs_of(x[:200], y[:200]), pairs_of(x[200:], y[200:])
    aligner = TwoWayAligner(4, 3)
    aligner.fit(fitted)
    extended = torch.cat([x[:200], torch.ones(200, 1)], dim=1)
    slope = torch.linalg.lstsq(extended, y[:200]).solution  # without the ridge
    torch.testing.assert_close(aligner.down.weight.detach(), slope[:-1].T, atol=0.01, rtol=0)
    left = (aligner.there(x[200:]).detach() - y[200:]).square().sum()
    variance = (y[200:] - y[200:].mean(0)).square().sum()
    assert aligner.unexplained(held_out) == pytest.approx(float(left / variance), rel=1e-4)
    assert held_out.count == 100
