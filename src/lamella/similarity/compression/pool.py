"""A layer's experts when fewer are stored than the router chooses from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lamella.aligners import Aligner
from lamella.backbones.moe import Expert, MoELayer
from lamella.backbones.moe.expert import Activation
from lamella.errors import LamellaError

Chosen = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class StoredExpert(nn.Module):
    """An expert that holds its matrices itself.

    Args:
        matrices: by their names in ``Expert``; one that another expert holds too is stored once.
        activation: as in ``Expert``.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        for name, matrix in matrices.items():
            self.register_parameter(name, matrix)

    @classmethod
    def copy_of(cls, expert: Expert) -> StoredExpert:
        """An expert of its own, with copies of the matrices."""
        return cls({name: _parameter(matrix) for name, matrix in expert.matrices.items()}, expert.activation)

    def behind(self, matrix: Tensor, bias: Tensor) -> StoredExpert:
        """The expert of ``matrix x + bias``: with gate and up of its own, and the same down-projection."""
        shared = {name: held for name, held in self.named_parameters() if name.startswith("down")}
        folded = fold(self.expert, matrix, bias).matrices
        return StoredExpert({name: nn.Parameter(new) for name, new in folded.items()} | shared, self.activation)

    @property
    def expert(self) -> Expert:
        """The expert, by views."""
        return Expert(activation=self.activation, **dict(self.named_parameters()))

    def forward(self, x: Tensor) -> Tensor:
        """The expert's output for tokens ``x (N, h)``, ``(N, h)``."""
        return self.expert(x)


class AlignedExpert(nn.Module):
    """A stored expert behind an aligner: what replaces an expert that is stored no more."""

    aligner: Aligner
    target: StoredExpert

    def __init__(self, aligner: Aligner, target: StoredExpert) -> None:
        super().__init__()
        self.aligner, self.target = aligner, target

    def forward(self, x: Tensor) -> Tensor:
        """The target's output for the aligned tokens, ``(N, h)`` for ``x (N, h)``."""
        return self.target(self.aligner(x))


class PooledExperts(nn.Module):
    """In the place of a layer's experts: the stored ones, and which of them does the work of each.

    A token whose router chose two experts that are one now gets that one's output once, with the sum of both weights.
    Layers that share an expert hold the same module, so ``parameters()`` counts it once.

    Args:
        stored: S modules, ``(N, h) -> (N, h)``.
        places: which of them does the work of each of the layer's E experts, ``(E,)``.
        chosen: reads indices ``(N, k)``, and which were kept, from what the router selected; the family's.
    """

    places: Tensor

    def __init__(self, stored: Sequence[nn.Module], places: Tensor, chosen: Chosen) -> None:
        super().__init__()
        self.stored = nn.ModuleList(stored)
        self.register_buffer("places", places)
        self.chosen = chosen

    @property
    def num_experts(self) -> int:
        """E: how many the router chooses from."""
        return len(self.places)

    def expert(self, index: int) -> Expert:
        """What does the work of one of the E experts, its aligner folded in.

        Raises:
            LamellaError: its aligner is not linear.
        """
        stored = self.stored[int(self.places[index])]
        if isinstance(stored, AlignedExpert):
            return fold(stored.target.expert, stored.aligner.matrix, stored.aligner.bias)
        assert isinstance(stored, StoredExpert)
        return stored.expert

    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, in the shape of ``hidden``.

        Args:
            hidden: ``(..., h)``, N tokens.
            selected: which experts, as the family's router puts it.
            weights: ``(N, k)``.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])  # (N, h)
        indices, kept = self.chosen(selected)  # (N, k)
        weights = weights if kept is None else weights * kept
        chosen = self.places[indices]  # (N, k)
        output = torch.zeros_like(flat)
        for place in chosen.unique().tolist():
            here = chosen == place  # (N, k)
            rows = here.any(dim=-1).nonzero()[:, 0]  # (n,)
            weight = (weights * here).sum(dim=-1)[rows, None]  # (n, 1)
            output.index_add_(0, rows, (self.stored[place](flat[rows]) * weight).to(output.dtype))
        return output.view_as(hidden)


def constant_expert(like: Expert, constant: Tensor) -> StoredExpert:
    """An expert without hidden units that puts out ``constant (h,)`` for every token."""
    hidden = like.down.shape[0]
    matrices = {"down": like.down.new_empty(hidden, 0), "down_bias": constant.to(like.down, copy=True)}
    for name in {"gate", "up"} & like.matrices.keys():
        matrices[name] = like.up.new_empty(0, hidden)
    return StoredExpert({name: nn.Parameter(matrix) for name, matrix in matrices.items()}, like.activation)


def expert_parameters(layers: Iterable[MoELayer]) -> int:
    """How many numbers the experts of layers store, each counted once."""
    held = {id(one): one.numel() for layer in layers for one in layer.experts_module.parameters()}
    return sum(held.values())


def _parameter(matrix: Tensor) -> nn.Parameter:
    return nn.Parameter(matrix.detach().clone(memory_format=torch.contiguous_format))


@torch.no_grad()
def fold(expert: Expert, matrix: Tensor, bias: Tensor | None = None) -> Expert:
    """The expert that computes ``expert(x @ matrix.T + bias)``, exactly but for rounding.

    Only what reads the input changes: ``gate M``, ``up M`` and their biases. ``down`` is the same tensor as before, so
    a model that stores the folded expert beside the first one stores gate and up a second time and down once.

    Args:
        expert: reads tokens ``(N, h)``.
        matrix: ``(h, h)``.
        bias: ``(h,)``; None for none. An expert without biases gets them for gate and up, ``(ff,)`` each.

    Raises:
        LamellaError: the matrix or the bias has another size than the expert's input.
    """
    hidden = expert.up.shape[1]
    if matrix.shape != (hidden, hidden) or (bias is not None and bias.shape != (hidden,)):
        raise LamellaError(
            f"An aligner of {tuple(matrix.shape)} cannot be folded into an expert that reads {hidden} numbers a token; "
            "take one that was trained for this model."
        )
    up, up_bias = _compose(expert.up, expert.up_bias, matrix, bias)
    if expert.gate is None:
        return replace(expert, up=up, up_bias=up_bias)
    gate, gate_bias = _compose(expert.gate, expert.gate_bias, matrix, bias)
    return replace(expert, up=up, up_bias=up_bias, gate=gate, gate_bias=gate_bias)


def _compose(weight: Tensor, bias: Tensor | None, matrix: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``weight (matrix x + shift) + bias`` as one matrix ``(ff, h)`` and one bias ``(ff,)``, in the weight's type."""
    # the product is rounded to the weight's type once, after it was made in the wider of the two types
    wide = torch.promote_types(weight.dtype, matrix.dtype)
    composed = (weight.to(wide) @ matrix.to(wide)).to(weight.dtype)  # (ff, h)
    if shift is None:
        return composed, bias
    moved = weight.to(wide) @ shift.to(wide)  # (ff,)
    return composed, (moved if bias is None else moved + bias.to(wide)).to(weight.dtype)
