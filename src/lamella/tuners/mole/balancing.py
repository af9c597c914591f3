"""What a composition's routers pay for using the LoRAs unevenly, and how the loss reaches them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lamella.routing import Frame, RouterLoss, attach, refuse_reentrant_collection
from lamella.routing.balance import JointBalance, entropy_gradient, entropy_loss, mean_probs

Function = Callable[..., Tensor]  # of logits and a mask of their rows


@dataclass(frozen=True)
class RouterBalance:
    """One router's part in the balance loss.

    Attributes:
        adapter: that it belongs to.
        name: of what it decides for.
        kind: "log", "entropy", "switch" or "none".
        coefficient: of the loss.
        share: what this router's own loss counts, one over the routers of its block; a log balance is one loss of all.
    """

    adapter: str
    name: str
    kind: str
    coefficient: float
    share: float = 1.0

    @property
    def counts(self) -> bool:
        """Whether there is any loss."""
        return self.kind != "none" and self.coefficient > 0

    def attach(self, weights: Tensor, logits: Tensor, real: Tensor | None, trains: bool, frame: Frame) -> Tensor:
        """Attaches the router's loss.

        Args:
            weights: its weights, which the task loss depends on; returned with the same values.
            logits: of the same shape.
            real: rows that decide for something real, ``(rows,)``; None for all.
            trains: whether the router does.
            frame: the running stack's.
        """
        if trains:
            refuse_reentrant_collection(frame)
        if self.kind == "log":
            return self._attach_log(weights, logits, real, trains, frame)
        if not logits.requires_grad:
            return weights
        value, gradient = self._own()
        return attach(weights, logits, _by_row(value), _by_row(gradient), (real,), frame, self.name)

    def _attach_log(self, weights: Tensor, logits: Tensor, real: Tensor | None, trains: bool, frame: Frame) -> Tensor:
        """The loss of all routers together, whose means are all known when the backward pass begins."""
        if not trains:
            return weights
        collects = frame.call.collected is not None
        joint = frame.call.balances.setdefault(self.adapter, JointBalance(self.coefficient))
        mean = mean_probs(logits.flatten(0, -2), real)  # (K,)
        joint.means[self.name] = mean if collects else mean.detach()
        if collects or not logits.requires_grad:  # where losses are collected, the call hands it over when it ends
            return weights
        return attach(weights, logits, _never, _by_row(joint.gradient), (real,), frame, self.name)

    def _own(self) -> tuple[Function, Function]:
        """One router's loss and its gradient, from logits ``(N, K)`` and the mask."""
        coefficient = self.coefficient * self.share
        if self.kind == "entropy":
            return (
                lambda logits, real: coefficient * entropy_loss(logits, real),
                lambda logits, real: entropy_gradient(logits, real) * coefficient,
            )
        loss = RouterLoss(coefficient, 0.0)
        return (
            lambda logits, real: loss.value(logits, logits.argmax(dim=-1, keepdim=True), real),
            lambda logits, real: loss.gradient(logits, logits.argmax(dim=-1, keepdim=True), real),
        )


def _by_row(function: Function) -> Function:
    """The same on logits ``(*rows, K)``; a gradient comes back in their shape."""

    def laid_out(logits: Tensor, real: Tensor | None) -> Tensor:
        result = function(logits.flatten(0, -2), real)
        return result.view_as(logits) if result.dim() else result

    return laid_out


def _never(*_: Any) -> Tensor:
    raise AssertionError("a collected log balance is handed over when the call ends")
