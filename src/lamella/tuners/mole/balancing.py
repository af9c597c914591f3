"""What a composition's routers pay for using the LoRAs unevenly, and how the loss reaches them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lamella.routing import Frame, RouterLoss, attach, refuse_reentrant_collection
from lamella.routing.balance import JointBalance, entropy_gradient, entropy_loss, mean_probs

if TYPE_CHECKING:
    from lamella.tuners.mole.unit import Unit


def attach_balance(unit: "Unit", weights: Tensor, logits: Tensor, real: Tensor | None, frame: Frame) -> Tensor:
    """Gives one router its share of the balance loss.

    Args:
        unit: that has decided.
        weights: its weights, which the task loss depends on; returned with the same values.
        logits: of the same shape.
        real: rows that decide for something real, ``(rows,)``; None for all.
        frame: the running stack's.
    """
    config = unit.config
    if not unit.leader.training or config.balance == "none" or config.router_aux_loss_coef == 0:
        return weights
    trains = any(p.requires_grad for p in unit.router.parameters())
    if trains:
        refuse_reentrant_collection(frame)
    if config.balance == "log" and trains:
        _add_mean(unit, logits, real, frame)
    if not logits.requires_grad:
        return weights
    if config.balance == "log":
        return weights if frame.call.collected is not None else _attach_log(unit, weights, logits, real, frame)
    coefficient = config.router_aux_loss_coef * unit.balance_share
    value, gradient = _own_loss(config.balance, coefficient)
    return attach(weights, logits, _by_row(value), _by_row(gradient), (real,), frame, unit.name)


def _own_loss(balance: str, coefficient: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """One router's loss and its gradient, from logits ``(N, K)`` and the mask."""
    if balance == "entropy":
        return (
            lambda logits, real: coefficient * entropy_loss(logits, real),
            lambda logits, real: entropy_gradient(logits, real) * coefficient,
        )
    loss = RouterLoss(coefficient, 0.0)
    return (
        lambda logits, real: loss.value(logits, logits.argmax(dim=-1, keepdim=True), real),
        lambda logits, real: loss.gradient(logits, logits.argmax(dim=-1, keepdim=True), real),
    )


def _by_row(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same on logits ``(*rows, K)``; a gradient comes back in their shape."""

    def laid_out(logits: Tensor, real: Tensor | None) -> Tensor:
        result = function(logits.flatten(0, -2), real)
        return result.view_as(logits) if result.dim() else result

    return laid_out


def _add_mean(unit: "Unit", logits: Tensor, real: Tensor | None, frame: Frame) -> None:
    """Adds a router's mean weights to those of the others in this call: the loss is one of all together."""
    mean = mean_probs(logits.flatten(0, -2), real)  # (K,)
    joint = frame.call.balances.setdefault(unit.adapter, JointBalance(unit.config.router_aux_loss_coef))
    joint.means[unit.name] = mean.detach() if frame.call.collected is None else mean


def _attach_log(unit: "Unit", weights: Tensor, logits: Tensor, real: Tensor | None, frame: Frame) -> Tensor:
    """The routers' means are all known when the backward pass begins."""
    joint = frame.call.balances[unit.adapter]
    return attach(weights, logits, _never, _by_row(joint.gradient), (real,), frame, unit.name)


def _never(*_: Any) -> Tensor:
    raise AssertionError("a collected log balance is handed over when the call ends")
