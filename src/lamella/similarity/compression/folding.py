"""A linear aligner written into an expert's own matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lamella.backbones.moe import Expert
from lamella.errors import LamellaError


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


def folded_parameters(expert: Expert) -> int:
    """How many numbers a folded copy stores beside the expert with whose ``down`` it shares storage.

    Gate and up with one bias each: every trained aligner has a bias.
    """
    readers = [matrix for matrix in (expert.gate, expert.up) if matrix is not None]  # (ff, h) each
    return sum(matrix.numel() + matrix.shape[0] for matrix in readers)


def _compose(weight: Tensor, bias: Tensor | None, matrix: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``weight (matrix x + shift) + bias`` as one matrix ``(ff, h)`` and one bias ``(ff,)``, in the weight's type."""
    # the product is rounded to the weight's type once, after it was made in the wider of the two types
    wide = torch.promote_types(weight.dtype, matrix.dtype)
    composed = (weight.to(wide) @ matrix.to(wide)).to(weight.dtype)  # (ff, h)
    if shift is None:
        return composed, bias
    moved = weight.to(wide) @ shift.to(wide)  # (ff,)
    return composed, (moved if bias is None else moved + bias.to(wide)).to(weight.dtype)
