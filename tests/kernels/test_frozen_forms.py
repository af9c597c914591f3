"""The frozen forms equal the loops over rows and LoRAs, forwards and backwards, in float64."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.reference import mole
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.kernels import (
    FrozenLoras,
    concatenate,
    forward_frozen,
    leave_out_unused,
    mix_frozen,
    mix_merged,
    mix_plain,
    prefers_merged,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
Per = Literal["token", "sequence", "call"]


@dataclass
class Case:
    """One module: K LoRAs of given ranks (0: absent) over a batch of sequences."""

    ranks: list[int]
    per: Per
    seed: int
    batch: int = 2
    tokens: int = 3
    fan_in: int = 5
    fan_out: int = 4

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.loras = [self.lora(rank) if rank else None for rank in self.ranks]
        self.frozen = concatenate(self.loras, torch.float64)
        self.weight, self.bias = self.draw(self.fan_out, self.fan_in), self.draw(self.fan_out)
        self.x = self.draw(self.batch, self.tokens, self.fan_in).requires_grad_()
        lead = {"token": (self.batch, self.tokens), "sequence": (self.batch,), "call": ()}[self.per]
        self.weights = self.draw(*lead, len(self.ranks)).requires_grad_()
        self.direction = self.draw(self.batch, self.tokens, self.fan_out)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def lora(self, rank: int) -> tuple[Tensor, Tensor, float]:
        return self.draw(rank, self.fan_in), self.draw(self.fan_out, rank), float(self.draw(()).abs())

    def base(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def by_loops(self) -> Tensor:
        lead = self.weights
        while lead.dim() < 3:
            lead = lead.unsqueeze(-2)
        rows = lead.expand(self.batch, self.tokens, -1).flatten(0, 1)
        y = self.base(self.x)
        return mole.mix(y.flatten(0, 1), self.x.flatten(0, 1), self.loras, rows).view_as(y)

    def in_rank_space(self, in_place: bool = False) -> Tensor:
        h = self.x @ self.frozen.A.t()
        return mix_frozen(self.base(self.x), h, self.weights, self.frozen.B, self.frozen.ranks, in_place)

    def merged(self) -> Tensor:
        return mix_merged(self.x, self.weights, self.weight, self.bias, self.frozen)

    def as_one(self) -> Tensor:
        return mix_plain(self.x, self.weights, self.weight, self.bias, self.frozen)

    def gradients(self, result: Tensor) -> tuple[Tensor, Tensor]:
        if not result.numel():
            return torch.zeros_like(self.x), torch.zeros_like(self.weights)
        actual = torch.autograd.grad((result * self.direction).sum(), (self.x, self.weights), allow_unused=True)
        return actual[0], actual[1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = draw(st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any))
    per = draw(st.sampled_from(["token", "sequence", "call"]))
    return Case(ranks, per, draw(st.integers(0, 9999)), draw(st.integers(1, 3)), draw(st.integers(0, 4)))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_all_forms_equal_the_loops_in_outputs_and_gradients(case: Case) -> None:
    expected = case.by_loops()
    gradients = case.gradients(expected)
    forms = {
        "rank space": case.in_rank_space(),
        "in place": case.in_rank_space(True),
        "as one": case.as_one(),
        "merged": case.merged(),
    }
    for name, result in forms.items():
        torch.testing.assert_close(result, expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        for actual, wanted in zip(case.gradients(result), gradients, strict=True):
            torch.testing.assert_close(actual, wanted, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("per", ["token", "sequence", "call"])
def test_gradcheck(per: Per) -> None:
    case = Case([2, 0, 1, 1], per, seed=1, fan_in=3, fan_out=2)
    assert torch.autograd.gradcheck(
        lambda x, weights: mix_frozen(
            case.base(x), x @ case.frozen.A.t(), weights, case.frozen.B, case.frozen.ranks, in_place=True
        ),
        (case.x, case.weights),
    )
    for form in (mix_merged, mix_plain):
        assert torch.autograd.gradcheck(
            lambda x, weights, form=form: form(x, weights, case.weight, case.bias, case.frozen), (case.x, case.weights)
        )


@pytest.mark.parametrize("which", [0, 2])
def test_weight_one_for_a_single_lora_is_that_lora(which: int) -> None:
    case = Case([2, 1, 3], "call", seed=2)
    one_hot = torch.eye(3, dtype=torch.float64)[which]
    A, B, scaling = case.loras[which]
    alone = case.base(case.x) + scaling * case.x @ A.t() @ B.t()
    case.weights = one_hot
    torch.testing.assert_close(case.in_rank_space(), alone, **CLOSE)
    torch.testing.assert_close(case.as_one(), alone, **CLOSE)
    torch.testing.assert_close(case.merged(), alone, **CLOSE)


def test_weights_of_zero_leave_the_layer_as_the_base_bit_for_bit() -> None:
    case = Case([2, 1], "call", seed=2)
    assert torch.equal(mix_merged(case.x, torch.zeros(2), case.weight, case.bias, case.frozen), case.base(case.x))


def test_the_gradient_through_a_router_that_read_the_same_rank_space_is_whole() -> None:
    case = Case([2, 1], "token", seed=4)
    router = case.draw(2, 3)

    def composed(x: Tensor, form: str) -> Tensor:
        h = x @ case.frozen.A.t()
        weights = torch.softmax(h @ router.t(), dim=-1)
        if form == "loops":
            flat = mole.mix(case.base(x).flatten(0, 1), x.flatten(0, 1), case.loras, weights.flatten(0, 1))
            return flat.view(*x.shape[:-1], -1)
        return mix_frozen(case.base(x), h, weights, case.frozen.B, case.frozen.ranks)

    by_loops, ours = (torch.autograd.grad(composed(case.x, f).sin().sum(), case.x)[0] for f in ("loops", "frozen"))
    torch.testing.assert_close(ours, by_loops, **CLOSE)


def test_scalings_are_multiplied_in_before_rounding_and_absent_loras_have_rank_zero() -> None:
    A, B = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((4, 2), 1.0078125, dtype=torch.bfloat16)
    frozen = concatenate([None, (A, B, 1 / 3)], torch.bfloat16)
    assert frozen.ranks == (0, 2)
    assert torch.equal(frozen.B, (B.float() / 3).bfloat16())
    assert not frozen.B.requires_grad


def plain_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return (layer.weight.t(), layer.bias) if isinstance(layer, Conv1D) else (layer.weight, layer.bias)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "called as it is"])
def test_a_layer_computes_the_same_in_whichever_form_is_chosen(kind: str, rows: int) -> None:
    case = Case([2, 3], "sequence", seed=5, tokens=rows, fan_in=6, fan_out=6)
    layer = (Conv1D(6, 6) if kind == "conv1d" else nn.Linear(6, 6)).double().requires_grad_(False)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    plain = None if kind == "called as it is" else plain_of(layer)
    case.weight, case.bias = plain_of(layer)
    result = forward_frozen(layer, plain, case.x, case.weights, case.frozen)
    assert prefers_merged(rows, 6, 6) == (rows == 40)
    assert len(calls) == (1 if plain is None else 0)
    expected = case.by_loops()
    torch.testing.assert_close(result, expected, **CLOSE)
    for actual, wanted in zip(case.gradients(result), case.gradients(expected), strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


def test_a_rank_space_that_is_there_already_is_used() -> None:
    case = Case([2, 3], "token", seed=6)
    h = case.x @ case.frozen.A.t()
    useless = FrozenLoras(torch.full_like(case.frozen.A, torch.nan), case.frozen.B, case.frozen.ranks)
    result = forward_frozen(case.base, None, case.x, case.weights, useless, h)
    torch.testing.assert_close(result, case.by_loops(), **CLOSE)


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_low_precision_stays_close_to_float32_and_keeps_the_weights_gradient_wide(how: str, rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16).requires_grad_(False)
    loras = concatenate([(torch.randn(4, 16) / 4, torch.randn(16, 4) / 2, 0.5) for _ in range(3)], torch.float32)
    x, weights = torch.randn(1, rows, 16), torch.softmax(torch.randn(3), -1).requires_grad_()
    exact = forward_frozen(layer, plain_of(layer), x, weights, loras)
    (wanted,) = torch.autograd.grad(exact.square().sum(), weights)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            result = forward_frozen(layer, plain_of(layer), x, weights, loras)
    else:
        layer = layer.bfloat16()
        result = forward_frozen(layer, plain_of(layer), x.bfloat16(), weights, loras.to(torch.bfloat16))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.05)
    (actual,) = torch.autograd.grad(result.float().square().sum(), weights)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


def test_loras_in_float32_on_a_layer_in_bfloat16_answer_in_the_layers_precision() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).bfloat16().requires_grad_(False)
    loras = concatenate([(torch.randn(2, 4), torch.randn(4, 2), 1.0)], torch.float32)
    for rows in (1, 9):
        x = torch.randn(rows, 4).bfloat16()
        result = forward_frozen(layer, plain_of(layer), x, torch.ones(1), loras)
        assert result.dtype == torch.bfloat16
        exact = layer(x).float() + x.float() @ loras.A.t() @ loras.B.t()
        torch.testing.assert_close(result.float(), exact, rtol=0.03, atol=0.1)


def test_what_needs_no_gradient_gets_none() -> None:
    case = Case([2, 1], "call", seed=7)
    for form in (case.in_rank_space, case.as_one, case.merged):
        assert case.gradients(form())[1] is not None
        case.weights = case.weights.detach()
        result = form()
        assert torch.autograd.grad(result.sum(), case.x)[0].any()
        case.weights.requires_grad_()
        case.x = case.x.detach()
        assert torch.autograd.grad(form().sum(), case.weights)[0].any()
        case.x.requires_grad_()


@pytest.mark.parametrize("form", ["in_rank_space", "as_one", "merged"])
def test_second_derivatives_are_refused_not_wrong(form: str) -> None:
    case = Case([2, 1], "call", seed=8)
    (first,) = torch.autograd.grad(getattr(case, form)().square().sum(), case.weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_merging_pays_from_about_half_the_width_on_whatever_the_ranks() -> None:
    assert not prefers_merged(1, 768, 768)
    assert not prefers_merged(384, 768, 768)
    assert prefers_merged(512, 768, 768)
    assert not prefers_merged(512, 768, 3072)
    assert prefers_merged(1024, 768, 3072)


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    used=st.lists(st.booleans(), min_size=4, max_size=4),
    per=st.sampled_from(["token", "sequence", "call"]),
)
def test_leaving_out_loras_without_weight_changes_nothing(ranks: list[int], used: list[bool], per: Per) -> None:
    assume(any(ranks) and any(used))
    case, kept = Case(ranks, per, seed=0), torch.tensor(used)
    with torch.no_grad():
        case.weights *= kept
    forms = [case.in_rank_space, case.as_one, *([case.merged] if per != "token" else [])]
    expected = [(form(), *case.gradients(form())) for form in forms]
    weights, loras = case.weights, case.frozen
    for form, (result, of_x, of_weights) in zip(forms, expected, strict=True):
        case.weights, case.frozen = leave_out_unused(weights, loras)
        assert case.frozen.ranks == tuple(rank for rank, one in zip(ranks, used, strict=True) if one)
        fewer = form()
        torch.testing.assert_close(fewer, result, **CLOSE)
        actual = torch.autograd.grad((fewer * case.direction).sum(), (case.x, weights))
        torch.testing.assert_close(actual[0], of_x, **CLOSE)
        torch.testing.assert_close(actual[1], of_weights * kept, **CLOSE)


def test_where_no_lora_has_weight_none_is_left_out() -> None:
    case = Case([1, 2], "sequence", seed=0)
    weights = torch.zeros_like(case.weights)
    assert leave_out_unused(weights, case.frozen) == (weights, case.frozen)
