"""Decisions that several layers share: their weights, what may be said in their place, and how they are recomputed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lamella.routing.documents import Sequences

Score = Literal["softmax", "sigmoid"]


class Projection(NamedTuple):
    """Products of one input that several layers are given, computed in one GEMM by the first of them.

    Attributes:
        x: the input they are for.
        down: ``A x`` of the layer's experts side by side, ``(*rows, R)``; None where it needs none.
        scores: its router's product, ``(N, E)``; None without a router.
    """

    x: Tensor
    down: Tensor | None
    scores: Tensor | None = None


def mixing_weights(logits: Tensor, top_k: int | None, score: Score = "softmax") -> Tensor:
    """The weights of the ``top_k`` largest of ``logits (..., K)``, zero for the rest; of all K where it is None.

    By "softmax" they are shares of 1 among those k; by "sigmoid" gates ``2 sigmoid(logit)``, each by itself between 0
    and 2, and 1 at a logit of 0.

    Those that tie with the last of them count too: no expert is preferred for its number, and routers that still are
    zero give all the same weight. A single expert's share is 1 whatever its logit, which would tell its router
    nothing; its gradient is that of ``p / stopgrad(p)``, p its softmax over all, as in MoLEx.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.softmax(logits, dim=-1) if score == "softmax" else 2 * torch.sigmoid(logits)
    rest = logits < logits.topk(top_k, dim=-1).values[..., -1:]
    if score == "sigmoid":
        return 2 * torch.sigmoid(logits).masked_fill(rest, 0)
    weights = torch.softmax(logits.masked_fill(rest, -torch.inf), dim=-1)
    if top_k > 1:
        return weights
    chances = torch.log_softmax(logits, dim=-1)
    return weights * (chances - chances.detach()).masked_fill(rest, 0).exp()


@dataclass(frozen=True, eq=False)
class Override:
    """What a user says in place of the routers of one adapter.

    Attributes:
        adapter: its name.
        allowed: True for the experts that are not left out, ``(K,)``; None for all.
        fixed: the weights in place of the routers', ``(K,)`` or ``(batch, K)``; None for the routers' own.
    """

    adapter: str = ""
    allowed: Tensor | None = None
    fixed: Tensor | None = None

    def equals(self, other: "Override") -> bool:
        """Whether the other says the same."""
        pairs = ((self.allowed, other.allowed), (self.fixed, other.fixed))
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def weights(self, logits: Tensor, top_k: int | None, score: Score) -> Tensor:
        """The weights of the experts that are not left out, of the ``top_k`` best of them where it is given."""
        return mixing_weights(self.masked(logits), top_k, score)

    def masked(self, logits: Tensor) -> Tensor:
        """Minus infinity for the experts that are left out."""
        return logits if self.allowed is None else logits.masked_fill(~self.allowed.to(logits.device), -torch.inf)

    def fixed_weights(self, device: torch.device) -> Tensor:
        """The fixed weights, with what the experts left out had given to the others in proportion.

        Weights may be negative, so that shares are of the sum of their absolute values.
        """
        assert self.fixed is not None
        fixed = self.fixed.to(device)
        if self.allowed is None:
            return fixed
        left = fixed * self.allowed.to(device)
        whole, rest = (weights.abs().sum(dim=-1, keepdim=True) for weights in (fixed, left))
        return left * (whole / rest.masked_fill(rest == 0, 1))

    @property
    def leaves_nothing(self) -> bool:
        """Whether fixed weights all belong to experts that are left out."""
        if self.fixed is None or self.allowed is None:
            return False
        left = self.fixed * self.allowed.to(self.fixed.device)
        return bool((self.fixed.any(dim=-1) & ~left.any(dim=-1)).any())


@dataclass(frozen=True, eq=False)
class Decision:
    """A decision of one call.

    Attributes:
        weights: ``(sequences, K)``, ``(batch, tokens, K)``, or ``(rows, K)`` outside the blocks.
        taken_at: the module at whose call it was taken.
        rows: of that module's input.
        without: tokens that run with uniform weights, ``(batch, tokens)``; None where there are none.
        uniform: those weights, ``(K,)``.
        sequences: that the decision is for; None where it is for tokens.
    """

    weights: Tensor
    taken_at: nn.Module
    rows: torch.Size
    without: Tensor | None = None
    uniform: Tensor | None = None
    sequences: Sequences | None = None


@dataclass(eq=False)
class CachedDecision:
    """A decision for whole sequences, to hold as long as they go on.

    Attributes:
        tensors: what was decided, each ``(batch, ...)``.
        extent: by how many first tokens, and how many run without it (``Readable.extent``), ``(batch, 2)``.
        prompt_tokens: by how many it is taken where nothing tells the prompt.
        worked_out: what its layer makes of it, so that no later token has it made again; not for other sequences.
    """

    tensors: tuple[Tensor, ...]
    extent: Tensor
    prompt_tokens: int
    worked_out: Any = field(default=None, init=False)

    def by(self, choose: Callable[[Tensor], Tensor]) -> "CachedDecision":
        """The decision for a batch made of these sequences in another way."""
        return replace(self, tensors=tuple(choose(tensor) for tensor in self.tensors), extent=choose(self.extent))


class SharedDecision:
    """A decision for many blocks, each of which may be recomputed by itself in the backward pass.

    Reentrant checkpointing runs blocks without a graph and, in the backward pass, recomputes them one by one from the
    last to the first. When the block that decides gets its graph, those that used the decision have had their backward
    pass. So what they say about the weights is gathered in a leaf, and added where the block that decides gets its own
    gradient.
    """

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.leaf: Tensor | None = None

    def seen(self, recomputing: bool) -> Decision:
        """The decision for another block."""
        if not (recomputing and torch.is_grad_enabled()) or self.decision.weights.requires_grad:
            return self.decision
        if self.leaf is None:
            self.leaf = self.decision.weights.detach().requires_grad_()
        return replace(self.decision, weights=self.leaf)

    def retaken(self, weights: Tensor) -> Tensor:
        """The weights that the block that decides computes again, with what the other blocks have gathered."""
        if self.leaf is None:
            return weights
        gathered: Tensor = _AddGathered.apply(weights, self.leaf)
        return gathered


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
