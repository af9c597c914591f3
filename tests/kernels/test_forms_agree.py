"""All forms compute the same, forwards and backwards, in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import mola
from torch import Tensor

from lamella.kernels import choose_form, mix_dense, mix_few, mix_reference, mix_sorted, project

SCALING = 1.75
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@dataclass
class Case:
    """One module: N tokens, E experts of rank r, k used per token."""

    tokens: int
    experts: int
    top_k: int
    rank: int
    seed: int
    fan_in: int = 5
    fan_out: int = 4
    unused: int | None = None  # this expert is never chosen

    def leaves(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

        return {
            "y": draw(self.tokens, self.fan_out),
            "x": draw(self.tokens, self.fan_in),
            "A": draw(self.experts, self.rank, self.fan_in),
            "B": draw(self.experts, self.fan_out, self.rank),
            "router": draw(self.experts, self.fan_in),
        }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, experts))
    unused = draw(st.none() | st.integers(0, experts - 1)) if top_k < experts else None
    return Case(
        draw(st.integers(0, 6)), experts, top_k, draw(st.integers(1, 3)), draw(st.integers(0, 9999)), unused=unused
    )


def decide(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = leaves["x"] @ leaves["router"].t()
    if case.unused is not None:
        logits = logits - 50 * torch.nn.functional.one_hot(torch.tensor(case.unused), case.experts)
    largest, indices = logits.topk(case.top_k, dim=-1)
    if case.top_k > 1:
        return torch.softmax(largest, dim=-1), indices
    chance = torch.log_softmax(logits, dim=-1).gather(-1, indices)  # one alone weighs 1, with its chance's gradient
    return (chance - chance.detach()).exp(), indices


def spread(case: Case, weights: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(case.tokens, case.experts, dtype=weights.dtype).scatter(-1, indices, weights)


def by_dense(case: Case, leaves: dict[str, Tensor], in_place: bool = False) -> Tensor:
    # Not the leaf itself: in the layer, too, y is the result of an operation.
    y = leaves["y"] * 1
    h, product = project(leaves["x"], [leaves["A"].flatten(0, 1), leaves["router"]])
    torch.testing.assert_close(product, leaves["x"] @ leaves["router"].t(), **CLOSE)
    weights = spread(case, *decide(case, leaves))
    result = mix_dense(y, h, weights, leaves["B"], SCALING, in_place)
    assert case.tokens == 0 or (result.data_ptr() == y.data_ptr()) == in_place
    return result


def by_sorted(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    weights, indices = decide(case, leaves)
    return mix_sorted(leaves["y"], leaves["x"], weights, indices, leaves["A"], leaves["B"], SCALING)


def by_reference(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    weights = spread(case, *decide(case, leaves))
    return mix_reference(leaves["y"], leaves["x"], leaves["A"], leaves["B"], weights, SCALING)


def by_loops(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    logits = mola.linear_logits(leaves["x"], leaves["router"]) if case.tokens else leaves["x"]
    if case.unused is not None and case.tokens:
        logits = logits - 50 * torch.nn.functional.one_hot(torch.tensor(case.unused), case.experts)
    chosen = mola.choose(logits, case.top_k)
    return mola.mola(leaves["y"], leaves["x"], leaves["A"], leaves["B"], chosen, SCALING)


FORMS = {
    "dense": by_dense,
    "dense in place": lambda case, leaves: by_dense(case, leaves, in_place=True),
    "sorted": by_sorted,
    "reference": by_reference,
}


def gradients(result: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    # A loss that weighs every output differently, so that no two mistakes cancel.
    direction = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)
    (result * direction).sum().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


@settings(max_examples=30, deadline=None)
@given(cases())
def test_every_form_equals_the_loops_in_outputs_and_all_gradients(case: Case) -> None:
    leaves = case.leaves()
    expected = by_loops(case, leaves)
    expected_gradients = gradients(expected, leaves)
    for name, form in FORMS.items():
        leaves = case.leaves()
        result = form(case, leaves)
        torch.testing.assert_close(result, expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        for leaf, gradient in gradients(result, leaves).items():
            torch.testing.assert_close(
                gradient, expected_gradients[leaf], **CLOSE, msg=lambda m, name=name, leaf=leaf: f"{name}, {leaf}: {m}"
            )


@settings(max_examples=30, deadline=None)
@given(cases(), st.booleans())
def test_few_tokens_without_gradients_equal_them_too(case: Case, shares: bool) -> None:
    leaves = case.leaves()
    weights, indices = decide(case, leaves)
    A = leaves["A"][:1] if shares else leaves["A"]
    arguments = (leaves["y"], leaves["x"], weights, indices, A, leaves["B"])
    everyone = A.expand(case.experts, -1, -1)
    expected = mix_reference(leaves["y"], leaves["x"], everyone, leaves["B"], spread(case, weights, indices), SCALING)
    with torch.no_grad():
        torch.testing.assert_close(mix_few(*arguments, SCALING), expected, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_tokens_keeps_its_shapes_and_gets_zero_gradients(form: str) -> None:
    case = Case(tokens=0, experts=3, top_k=2, rank=2, seed=0)
    leaves = case.leaves()
    result = FORMS[form](case, leaves)
    assert result.shape == (0, case.fan_out)
    for gradient in gradients(result, leaves).values():
        assert not gradient.any()


@pytest.mark.parametrize("form", FORMS)
def test_an_unused_expert_gets_zero_gradient_and_the_used_ones_do_not(form: str) -> None:
    case = Case(tokens=6, experts=4, top_k=2, rank=2, seed=3, unused=1)
    leaves = case.leaves()
    actual = gradients(FORMS[form](case, leaves), leaves)
    for factor in ("A", "B"):
        assert not actual[factor][1].any()
        assert actual[factor][[0, 2, 3]].flatten(1).any(dim=1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.booleans())
def test_one_expert_without_weights_is_plain_lora(tokens: int, rank: int, in_place: bool) -> None:
    case = Case(tokens, 1, 1, rank, seed=tokens)
    leaves = case.leaves()
    (h,) = project(leaves["x"], [leaves["A"].flatten(0, 1)])
    result = mix_dense(leaves["y"] * 1, h, None, leaves["B"], SCALING, in_place)
    actual = gradients(result, leaves)
    again = case.leaves()
    plain = again["y"] + SCALING * again["x"] @ again["A"][0].t() @ again["B"][0].t()
    torch.testing.assert_close(result, plain, **CLOSE)
    few = mix_few(again["y"], again["x"], None, None, again["A"], again["B"], SCALING)
    torch.testing.assert_close(few, plain, **CLOSE)
    expected = gradients(plain, again)
    for leaf in ("y", "x", "A", "B"):
        torch.testing.assert_close(actual[leaf], expected[leaf], **CLOSE)


@pytest.mark.parametrize("form", ["dense", "dense in place", "sorted"])
@pytest.mark.parametrize("frozen", ["A", "B", "router", "x", "y"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(form: str, frozen: str) -> None:
    case = Case(tokens=5, experts=3, top_k=2, rank=2, seed=5)
    leaves = case.leaves()
    expected = gradients(FORMS[form](case, leaves), leaves)
    leaves = {name: leaf.detach().requires_grad_(name != frozen) for name, leaf in case.leaves().items()}
    result = FORMS[form](case, leaves)
    gradients(result, leaves)
    assert leaves[frozen].grad is None
    for name in set(leaves) - {frozen}:
        torch.testing.assert_close(leaves[name].grad, expected[name], **CLOSE)


@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_gradcheck(form: str) -> None:
    case = Case(tokens=4, experts=3, top_k=2, rank=2, seed=7, fan_in=3, fan_out=2)
    leaves = case.leaves()
    weights, indices = decide(case, leaves)
    weights = weights.detach().requires_grad_()

    def dense(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
        (h,) = project(x, [A.flatten(0, 1)])
        return mix_dense(y, h, spread(case, weights, indices), B, SCALING)

    def by_expert(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
        return mix_sorted(y, x, weights, indices, A, B, SCALING)

    arguments = (leaves["y"], leaves["x"], leaves["A"], leaves["B"], weights)
    assert torch.autograd.gradcheck(dense if form == "dense" else by_expert, arguments)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 5))
def test_project_is_each_map_by_itself(rows: list[int], tokens: int) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    factors = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in rows]
    together = project(x, factors)
    assert [product.shape for product in together] == [(tokens, n) for n in rows]
    sum((i + 1) * product.square().sum() for i, product in enumerate(together)).backward()
    actual = [x.grad, *(factor.grad for factor in factors)]
    x.grad = None
    for factor in factors:
        factor.grad = None
    alone = [x @ factor.t() for factor in factors]
    sum((i + 1) * product.square().sum() for i, product in enumerate(alone)).backward()
    for product, own in zip(together, alone, strict=True):
        torch.testing.assert_close(product, own, **CLOSE)
    for gradient, own in zip(actual, [x.grad, *(factor.grad for factor in factors)], strict=True):
        torch.testing.assert_close(gradient, own, **CLOSE)


@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_second_derivatives_are_refused_not_wrong(form: str) -> None:
    case = Case(tokens=4, experts=3, top_k=2, rank=2, seed=7)
    leaves = case.leaves()
    result = FORMS[form](case, leaves)
    (first,) = torch.autograd.grad(result.square().sum(), leaves["B"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_only_x_h_and_weights_are_kept_for_the_backward_pass() -> None:
    case = Case(tokens=64, experts=4, top_k=2, rank=2, seed=7, fan_in=16, fan_out=16)
    leaves = case.leaves()
    (h,) = project(leaves["x"], [leaves["A"].flatten(0, 1)])
    weights = spread(case, *decide(case, leaves)).detach().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix_dense(leaves["y"], h, weights, leaves["B"], SCALING)
    known = {h.data_ptr(), weights.data_ptr(), leaves["B"].data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} <= known


def test_the_dense_form_is_taken_for_few_columns_or_many_used_experts() -> None:
    assert choose_form(num_experts=8, r=8, top_k=2) == "dense"
    assert choose_form(num_experts=64, r=8, top_k=2) == "sorted"
    assert choose_form(num_experts=64, r=8, top_k=40) == "dense"
    assert choose_form(num_experts=1, r=512, top_k=1) == "dense"
