"""MOLE's arithmetic written to be read: one row, one LoRA at a time, every output materialised. Imports no lamella.

A LoRA is ``(A (r, in), B (out, r), scaling)``, or None in a layer that it does not adapt. Gradients are autograd's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float] | None


def output(lora: Lora, x: Tensor, width: int) -> Tensor:
    """What one LoRA puts out for one row, ``(out,)``; zeros where it is absent."""
    if lora is None:
        return torch.zeros(width, dtype=x.dtype)
    A, B, scaling = lora
    return scaling * (B @ (A @ x))


def mix(y: Tensor, x: Tensor, loras: Sequence[Lora], weights: Tensor) -> Tensor:
    """``y + sum_i G_i s_i B_i A_i x`` for rows ``x (N, in)``, ``y (N, out)``, with a weight per row, ``(N, K)``."""
    rows = []
    for row, base, own in zip(x, y, weights, strict=True):
        total = base
        for lora, weight in zip(loras, own, strict=True):
            total = total + weight * output(lora, row, len(base))
        rows.append(total)
    return torch.stack(rows) if rows else y


def logits(
    u: Tensor,
    modules: Sequence[Sequence[Lora]],
    widths: Sequence[int],
    e: Tensor,
    bias: Tensor,
    scale: float | None = None,
) -> Tensor:
    """One router's logits from one row: concatenate all outputs, normalise the whole, multiply by e.

    Args:
        u: ``(in,)``.
        modules: the K LoRAs of each matrix that is read.
        widths: the matrices' output widths.
        e: ``(K, K, sum of widths)``.
        bias: ``(K,)``.
        scale: of the mean over all numbers that are read; None for their sum.
    """
    read = [
        torch.cat([output(loras[i], u, w) for loras, w in zip(modules, widths, strict=True)]) for i in range(len(e))
    ]
    normalised = _normalised(torch.cat(read))
    if scale is None:
        return normalised @ e.flatten(1).t() + bias
    return torch.stack([scale * (normalised * row).mean() + b for row, b in zip(e.flatten(1), bias, strict=True)])


def logits_of_all_positions(
    u: Tensor, modules: Sequence[Sequence[Lora]], widths: Sequence[int], e: Tensor, bias: Tensor
) -> Tensor:
    """The same over a whole sequence ``u (L, in)``, with ``e (K, L, K, sum of widths)``."""
    read = [
        output(loras[i], row, w) for row in u for i in range(len(e)) for loras, w in zip(modules, widths, strict=True)
    ]
    return _normalised(torch.cat(read)) @ e.flatten(1).t() + bias


def mean_of_real(rows: Tensor, mask: Tensor) -> Tensor:
    """The mean of the rows ``(T, F)`` where the mask ``(T,)`` is True."""
    return torch.stack([row for row, real in zip(rows, mask, strict=True) if real]).mean(dim=0)


def _normalised(values: Tensor) -> Tensor:
    centred = values - values.mean()
    return centred / (centred.square().mean() + 1e-12).sqrt()
