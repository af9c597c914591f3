"""Router inputs from rank space equal the materialised outputs, forwards and backwards, in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import mole
from torch import Tensor

from lamella.kernels import concatenate, read_outputs, read_positions
from lamella.kernels.rank_space import _EPS

CLOSE = {"rtol": 1e-8, "atol": 1e-9}


@dataclass
class Case:
    """A router over K LoRAs that reads M matrices of one input u."""

    ranks: list[list[int]]  # of each matrix's LoRAs; 0: absent
    seed: int
    batch: int = 2
    tokens: int = 4
    fan_in: int = 5

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.widths = [3 + m for m in range(len(self.ranks))]
        self.modules = [
            [self.lora(rank, width) if rank else None for rank in ranks]
            for ranks, width in zip(self.ranks, self.widths, strict=True)
        ]
        self.frozen = [concatenate(loras, torch.float64) for loras in self.modules]
        K = len(self.ranks[0])
        self.u = self.draw(self.batch, self.tokens, self.fan_in).requires_grad_()
        self.e = self.draw(K, K, sum(self.widths)).requires_grad_()
        self.e_flat = self.draw(K, self.tokens, K, sum(self.widths)).requires_grad_()
        self.bias = self.draw(K).requires_grad_()
        self.mask = torch.rand(self.batch, self.tokens, generator=self.generator) < 0.6
        self.mask[:, 0] = True

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def lora(self, rank: int, width: int) -> tuple[Tensor, Tensor, float]:
        return self.draw(rank, self.fan_in), self.draw(width, rank), 0.5

    def h(self, u: Tensor) -> list[Tensor]:
        return [u @ frozen.A.t() for frozen in self.frozen]

    def pooled(self) -> tuple[Tensor, Tensor]:
        weight = self.mask.double()[..., None]
        mean = (self.u * weight).sum(dim=1) / weight.sum(dim=1)
        ours = read_outputs(self.h(mean), self.frozen, self.e, self.bias)
        # outputs first, then their mean, as the method says it
        naive = []
        for row, mask in zip(self.u, self.mask, strict=True):
            mean_u = mole.mean_of_real(row, mask)
            naive.append(mole.logits(mean_u, self.modules, self.widths, self.e, self.bias))
        return ours, torch.stack(naive)

    def by_token(self) -> tuple[Tensor, Tensor]:
        ours = read_outputs(self.h(self.u), self.frozen, self.e, self.bias)
        naive = [mole.logits(row, self.modules, self.widths, self.e, self.bias) for row in self.u.flatten(0, 1)]
        return ours, torch.stack(naive).view(self.batch, self.tokens, -1)

    def flattened(self) -> tuple[Tensor, Tensor]:
        ours = read_positions(self.h(self.u), self.frozen, self.e_flat, self.bias)
        naive = [mole.logits_of_all_positions(row, self.modules, self.widths, self.e_flat, self.bias) for row in self.u]
        return ours, torch.stack(naive)


INPUTS = ["pooled", "by_token", "flattened"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_loras = draw(st.integers(1, 4))
    ranks = st.lists(st.integers(0, 3), min_size=num_loras, max_size=num_loras).filter(any)
    return Case(draw(st.lists(ranks, min_size=1, max_size=3)), draw(st.integers(0, 9999)))


@pytest.mark.parametrize("kind", INPUTS)
@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_logits_and_gradients_equal_those_of_materialised_outputs(kind: str, case: Case) -> None:
    ours, naive = getattr(case, kind)()
    torch.testing.assert_close(ours, naive, **CLOSE)
    leaves = [case.u, case.bias, case.e_flat if kind == "flattened" else case.e]
    direction = case.draw(*ours.shape)
    actual = torch.autograd.grad((ours * direction).sum(), leaves)
    wanted = torch.autograd.grad((naive * direction).sum(), leaves)
    for gradient, expected in zip(actual, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_the_mean_of_the_outputs_is_the_output_of_the_mean() -> None:
    case = Case([[2, 1]], seed=3)
    row, mask = case.u[0], case.mask[0]
    outputs = torch.stack([mole.output(case.modules[0][0], token, case.widths[0]) for token in row])
    expected = mole.mean_of_real(outputs, mask)
    torch.testing.assert_close(mole.output(case.modules[0][0], mole.mean_of_real(row, mask), case.widths[0]), expected)


@pytest.mark.parametrize("kind", INPUTS)
def test_gradcheck(kind: str) -> None:
    case = Case([[1, 2], [2, 0]], seed=4, batch=1, tokens=2, fan_in=3)
    e = case.e_flat if kind == "flattened" else case.e
    read = read_positions if kind == "flattened" else read_outputs

    def logits(u: Tensor, e: Tensor, bias: Tensor) -> Tensor:
        return read(case.h(u.mean(dim=1) if kind == "pooled" else u), case.frozen, e, bias)

    assert torch.autograd.gradcheck(logits, (case.u, e, case.bias))


def test_logits_do_not_depend_on_the_scale_of_the_outputs() -> None:
    case = Case([[2, 2, 1]], seed=5)
    small = [frozen._replace(B=frozen.B * 1e-4) for frozen in case.frozen]
    h = case.h(case.u)
    torch.testing.assert_close(
        read_outputs(h, small, case.e, case.bias), read_outputs(h, case.frozen, case.e, case.bias), rtol=1e-3, atol=1e-3
    )


def test_loras_that_put_out_nothing_leave_the_bias_and_finite_gradients() -> None:
    case = Case([[2, 2]], seed=6)
    silent = [frozen._replace(B=torch.zeros_like(frozen.B)) for frozen in case.frozen]
    logits = read_outputs(case.h(case.u), silent, case.e, case.bias)
    torch.testing.assert_close(logits, case.bias.expand_as(logits))
    for gradient in torch.autograd.grad(logits.sum(), (case.u, case.e)):
        assert torch.isfinite(gradient).all()
    assert _EPS > 0


def test_a_mean_far_from_zero_does_not_drown_the_variance_in_float32() -> None:
    """Column means a thousand times what varies: E[x^2] - E[x]^2 would be off by tens of per cent."""
    case = Case([[2, 2]], seed=7)
    shifted = [frozen._replace(B=1000 + frozen.B) for frozen in case.frozen]
    single = [frozen._replace(A=frozen.A.float(), B=frozen.B.float()) for frozen in shifted]
    u = case.u.detach()
    e = case.e.detach() - case.e.detach().mean(dim=(1, 2), keepdim=True)
    exact = read_outputs([u @ f.A.t() for f in shifted], shifted, e)
    ours = read_outputs([u.float() @ f.A.t() for f in single], single, e.float())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_logits_are_wide_whatever_the_precision_around() -> None:
    case = Case([[2, 1], [1, 2]], seed=8)
    half = [frozen.to(torch.bfloat16) for frozen in case.frozen]
    h = [one.bfloat16() for one in case.h(case.u)]
    alone = read_outputs(h, half, case.e.float(), case.bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = read_outputs(h, half, case.e.float(), case.bias.float())
    assert alone.dtype == cast.dtype == torch.float32
    assert torch.equal(alone, cast)
