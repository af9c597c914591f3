import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import mola
from torch import Tensor

from lamella import LamellaError
from lamella.routing import CosineRouter, LinearRouter, Router, make_router


def features(tokens: int, size: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def router(kind: str, experts: int, size: int = 5, seed: int = 0, bias: bool = False) -> Router:
    torch.manual_seed(seed)
    made = make_router(kind, size, experts, bias=bias).double()
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.data())
def test_weights_are_the_softmax_over_all_restricted_and_renormalised(experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    x = features(data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 99)))
    made = router("linear", experts, seed=data.draw(st.integers(0, 99)))
    routing = made(x, top_k)
    dense = routing.dense_weights()
    for token, chosen in enumerate(mola.choose(mola.linear_logits(x, made.weight), top_k)):
        assert list(chosen) == routing.indices[token].tolist()  # largest first
        expected = torch.zeros(experts, dtype=x.dtype)
        for expert, weight in chosen.items():
            expected[expert] = weight
        torch.testing.assert_close(dense[token], expected)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(len(x), dtype=x.dtype))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(len(x), dtype=x.dtype))
    assert routing.num_experts == experts


@pytest.mark.parametrize("bias", [False, True])
def test_cosine_logits_are_the_cosine_over_the_feature_axis(bias: bool) -> None:
    x, made = features(4), router("cosine", 3, bias=bias)
    assert isinstance(made, CosineRouter)
    expected = mola.cosine_logits(x, made.weight, made.log_scale)
    if made.bias is not None:
        expected = expected + made.bias
    torch.testing.assert_close(made.logits(x), expected)


def test_linear_bias_is_added() -> None:
    x, made = features(4), router("linear", 3, bias=True)
    torch.testing.assert_close(made.logits(x), mola.linear_logits(x, made.weight) + made.bias)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_tokens_logits_do_not_change_when_the_others_do(kind: str) -> None:
    made, x = router(kind, 4), features(6)
    changed = x.clone()
    changed[1:] *= 37.0
    changed[2] = 0.0
    torch.testing.assert_close(made.logits(changed)[0], made.logits(x)[0], rtol=0, atol=0)
    assert not torch.equal(made.logits(changed)[2], made.logits(x)[2])


def test_cosine_ignores_a_tokens_length_and_survives_a_zero_token() -> None:
    made, x = router("cosine", 4), features(3)
    torch.testing.assert_close(made.logits(5 * x), made.logits(x))
    x[1] = 0.0
    x.requires_grad_()
    logits = made.logits(x)
    assert not logits[1].any()
    logits.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert made.weight.grad is not None
    assert made.weight.grad.isfinite().all()


def test_the_cosine_scale_starts_at_two_and_is_clamped_at_a_hundred() -> None:
    made, x = router("cosine", 2), features(1)
    assert isinstance(made, CosineRouter)
    assert made.log_scale.exp().item() == pytest.approx(2.0)
    with torch.no_grad():
        made.weight[0] = x[0]
        made.weight[1] = -x[0]
        made.log_scale.fill_(math.log(1e6))
    torch.testing.assert_close(made.logits(x), torch.tensor([[100.0, -100.0]], dtype=x.dtype))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_decision_is_taken_in_float32_or_wider(kind: str, dtype: torch.dtype) -> None:
    made = router(kind, 3).to(dtype)
    routing = made(features(4).to(dtype), 2)
    wide = torch.promote_types(dtype, torch.float32)
    assert routing.logits.dtype == routing.weights.dtype == routing.probs.dtype == wide


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_product_from_a_shared_gemm_gives_the_same_logits(kind: str) -> None:
    made, x = router(kind, 3), features(4)
    torch.testing.assert_close(made.logits(x, x @ made.weight.t()), made.logits(x))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_of_the_weights_reach_every_parameter(kind: str, top_k: int) -> None:
    made, x = router(kind, 4, bias=True), features(5)
    routing = made(x, top_k)
    (routing.weights * torch.tensor([1.0, -2.0], dtype=x.dtype)[:top_k]).sum().backward()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_a_single_experts_weight_is_one_and_has_the_gradient_of_its_probability() -> None:
    made, x, said = router("linear", 4), features(5), features(5, size=1, seed=1)
    weights = made(x, 1).weights
    assert torch.equal(weights, torch.ones(5, 1, dtype=x.dtype))
    (actual,) = torch.autograd.grad((weights * said).sum(), made.weight)
    chosen = mola.choose(mola.linear_logits(x, made.weight), 1)
    slow = torch.stack([weight for token in chosen for weight in token.values()])
    (expected,) = torch.autograd.grad((slow * said[:, 0]).sum(), made.weight)
    torch.testing.assert_close(actual, expected)


def test_the_default_weight_is_kaiming_uniform_without_bias() -> None:
    torch.manual_seed(0)
    made = LinearRouter(100, 50)
    assert made.bias is None
    assert made.weight.abs().max().item() == pytest.approx(0.1, rel=0.01)  # 1 / sqrt(in)


def test_an_unknown_kind_is_named_with_the_known_ones() -> None:
    with pytest.raises(LamellaError, match=r"'sigmoid'.*'cosine', 'linear'"):
        make_router("sigmoid", 3, 2)
