"""One decision for many blocks, each of which may be recomputed by itself in the backward pass.

Reentrant checkpointing runs blocks without a graph and, in the backward pass, recomputes them one by one from the last
to the first. When the block that decides gets its graph, those that used the decision have had their backward pass. So
what they say about the weights is gathered in a leaf, and added where the block that decides gets its own gradient.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamella.routing import Frame

if TYPE_CHECKING:
    from lamella.tuners.mole.decision import Decision
    from lamella.tuners.mole.unit import Unit


class SharedWeights:
    """A decision as other blocks see it."""

    def __init__(self, decision: "Decision") -> None:
        self.decision = decision
        self.leaf: Tensor | None = None

    @classmethod
    def share(cls, unit: "Unit", decision: "Decision", frame: Frame) -> Tensor:
        """Leaves a decision for the other blocks of a call; returns its weights for the block at hand."""
        shared: SharedWeights | None = frame.call.shared.get(unit)
        if frame.recomputing and shared is not None:
            if shared.leaf is None:
                return decision.weights
            gathered: Tensor = _AddGathered.apply(decision.weights, shared.leaf)
            return gathered
        frame.call.shared[unit] = cls(decision)
        return decision.weights

    def seen_from(self, frame: Frame) -> "Decision":
        """The decision for another block."""
        if not (frame.recomputing and torch.is_grad_enabled()) or self.decision.weights.requires_grad:
            return self.decision
        if self.leaf is None:
            self.leaf = self.decision.weights.detach().requires_grad_()
        return replace(self.decision, weights=self.leaf)


class _AddGathered(torch.autograd.Function):
    """The identity; its backward adds what other blocks have left in the leaf."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return (grad if gathered is None else grad + gathered), None
