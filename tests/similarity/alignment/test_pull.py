"""The pull towards a target's inputs."""

import math

import pytest
import torch
from tests.similarity.alignment.fakes import fake_capture, tiny_model

from lamella.errors import LamellaError
from lamella.similarity.alignment import Pull, align, fit_aligners


def _weights(*counts):
    weight = torch.zeros(len(counts), max(counts), 1, dtype=torch.float64)
    for at, count in enumerate(counts):
        weight[at, :count] = 1 / count
    return weight


def test_mmd_is_its_double_sum_without_padding():
    torch.manual_seed(0)
    inputs, aligned = torch.randn(7, 3, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    value = Pull("mmd", 2.0, sigma=1.5).towards(inputs).value(aligned, _weights(6, 4))

    def kernel(a, b):
        return sum(math.exp(-float((p - q).square().sum()) / (2 * 1.5**2)) for p in a for q in b) / len(a) / len(b)

    for at, count in enumerate((6, 4)):
        tokens = aligned[at, :count]
        expected = 2.0 * (kernel(tokens, tokens) + kernel(inputs, inputs) - 2 * kernel(tokens, inputs))
        assert float(value[at]) == pytest.approx(expected)


def test_kl_is_torchs_own():
    torch.manual_seed(0)
    inputs, aligned = torch.randn(9, 3, dtype=torch.float64) * 2 + 1, torch.randn(1, 6, 3, dtype=torch.float64)
    value = Pull("kl").towards(inputs).value(aligned, _weights(6))
    first, second = (
        torch.distributions.Normal(one.mean(0), one.std(0, unbiased=False)) for one in (aligned[0], inputs)
    )
    torch.testing.assert_close(value[0], torch.distributions.kl_divergence(first, second).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["mmd", "kl"])
def test_it_vanishes_at_the_targets_own_inputs_and_its_gradient_skips_padding(kind):
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, dtype=torch.float64)
    pull = Pull(kind).towards(inputs)
    assert float(pull.value(inputs[None], _weights(8))[0]) == pytest.approx(0, abs=1e-12)
    gradient = pull.gradient(torch.randn(2, 8, 3, dtype=torch.float64), _weights(8, 5))
    assert (gradient[1, 5:] == 0).all()
    assert (gradient[1, :5] != 0).any()


@pytest.mark.parametrize("kind", ["mmd", "kl"])
def test_it_draws_aligned_tokens_nearer(kind):
    model = tiny_model()
    capture = fake_capture(model)
    capture.samples[1, 1] = capture.samples[1, 1] * 2 + 1
    pairs = [((0, 0), (1, 1))]
    x, inputs = capture.inputs(0, 0), capture.inputs(1, 1)
    away = []
    for pull in (None, Pull(kind, weight=50.0)):
        aligner = fit_aligners(capture, model, pairs, "linear", steps=100, lr=0.01, pull=pull)[pairs[0]]
        with torch.no_grad():
            aligned = aligner(x)[None]
        away.append(float(Pull(kind).towards(inputs).value(aligned, torch.full((1, len(x), 1), 1 / len(x)))[0]))
    assert away[1] < 0.7 * away[0]
    assert align(capture, model, pairs, steps=5, pull=kind)["nmse"].notna().all()


def test_bad_pulls():
    with pytest.raises(LamellaError, match="positive"):
        Pull("mmd", weight=0.0)
    model = tiny_model()
    capture = fake_capture(model)
    capture.samples[1, 1], capture.documents[1, 1] = capture.samples[1, 1][:1], capture.documents[1, 1][:1]
    with pytest.raises(LamellaError, match="too few to pull towards"):
        align(capture, model, [((0, 0), (1, 1))], pull="kl", steps=3)
