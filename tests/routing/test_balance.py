import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import mola
from torch import Tensor

from lamella.routing import LinearRouter, RouterLoss, Routing, pool_mean, pool_mode
from lamella.routing import balance_loss as balance_of
from lamella.routing import z_loss as z_of


def routed(logits: Tensor, top_k: int) -> Routing:
    return LinearRouter(1, logits.shape[1]).route(logits, top_k)


def balance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    return balance_of(routing.logits, routing.indices, mask)


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    return z_of(routing.logits, mask)


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    experts, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    logits = torch.randn(tokens, experts, dtype=torch.float64, generator=generator).requires_grad_()
    mask = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
    return logits, draw(st.integers(1, experts)), None if mask is None else torch.tensor(mask)


@settings(max_examples=25, deadline=None)
@given(decisions())
def test_both_losses_equal_the_loops_in_value_and_gradient(decision: tuple[Tensor, int, Tensor | None]) -> None:
    logits, top_k, mask = decision
    routing = routed(logits, top_k)
    pairs = [
        (balance_loss(routing, mask), mola.balance_loss(logits, top_k, mask)),
        (z_loss(routing, mask), mola.z_loss(logits, mask)),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)
        gradient, oracle = (torch.autograd.grad(loss, logits)[0] for loss in (actual, expected))
        torch.testing.assert_close(gradient, oracle)


@settings(max_examples=25, deadline=None)
@given(decisions(), st.floats(0, 2), st.floats(0, 2))
def test_the_closed_gradient_is_the_gradient(
    decision: tuple[Tensor, int, Tensor | None], router_aux_loss_coef: float, router_z_loss_coef: float
) -> None:
    logits, top_k, mask = decision
    own, indices = RouterLoss(router_aux_loss_coef, router_z_loss_coef), routed(logits, top_k).indices
    (expected,) = torch.autograd.grad(own.value(logits, indices, mask), logits)
    torch.testing.assert_close(own.gradient(logits.detach(), indices, mask), expected)


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_it_is_one_when_all_experts_are_used_alike(experts: int) -> None:
    logits = 3.0 * torch.eye(experts, dtype=torch.float64)  # token e prefers expert e
    assert balance_loss(routed(logits, 1)).item() == pytest.approx(1.0)
    assert balance_loss(routed(logits, experts)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_it_is_the_number_of_experts_when_one_takes_everything(experts: int) -> None:
    logits = torch.zeros(5, experts, dtype=torch.float64)
    logits[:, 1] = 40.0
    assert balance_loss(routed(logits, 1)).item() == pytest.approx(experts)


def test_collapsed_routers_with_different_favourites_do_not_look_balanced() -> None:
    # The published code concatenates them and sees 1; each router by itself pays the full price.
    routers = [torch.zeros(5, 4, dtype=torch.float64).index_fill(1, torch.tensor([e]), 40.0) for e in range(4)]
    assert balance_loss(routed(torch.cat(routers), 1)).item() == pytest.approx(1.0)
    assert sum(balance_loss(routed(logits, 1)).item() for logits in routers) / 4 == pytest.approx(4.0)


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_padding_counts_for_nothing(loss) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, False, False])
    alone = loss(routed(logits[mask], 2))
    other = logits.clone()
    other[~mask] = 100 * torch.randn(3, 3, dtype=torch.float64)
    assert loss(routed(logits, 2), mask).item() == pytest.approx(alone.item())
    assert loss(routed(other, 2), mask).item() == pytest.approx(alone.item())
    assert loss(routed(logits, 2)).item() != pytest.approx(alone.item())


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_a_batch_of_padding_alone_costs_nothing(loss) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    value = loss(routed(logits, 2), torch.zeros(4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.data())
def test_pooling_reads_real_tokens_only(batch: int, tokens: int, data: st.DataObject) -> None:
    bits = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    mask = torch.tensor([data.draw(bits) for _ in range(batch)])
    torch.manual_seed(tokens)
    values = torch.randn(batch, tokens, 2, dtype=torch.float64)
    choices = torch.randint(0, 3, (batch, tokens))
    mean, mode = pool_mean(values, mask), pool_mode(choices, 3, mask)
    for row in range(batch):
        real = [t for t in range(tokens) if mask[row, t]]
        expected = sum((values[row, t] for t in real), torch.zeros(2, dtype=torch.float64)) / max(len(real), 1)
        torch.testing.assert_close(mean[row], expected)
        votes = [sum(int(choices[row, t]) == c for t in real) for c in range(3)]
        assert mode[row].item() == votes.index(max(votes))


def test_pooling_without_a_mask_reads_every_token() -> None:
    values = torch.arange(12.0).view(2, 3, 2)
    torch.testing.assert_close(pool_mean(values), torch.tensor([[2.0, 3.0], [8.0, 9.0]]))
    assert pool_mode(torch.tensor([[0, 2, 2], [1, 0, 1]]), 3).tolist() == [2, 1]
