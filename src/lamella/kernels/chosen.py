"""LoRAs that each sequence has chosen for itself, of which only those are at hand: ``y + sum_i G_i s_i B_i A_i x``.

A and B are constants, so that autograd keeps ``h = A x`` and the weights, never x.
"""

import torch
from torch import Tensor

from lamella.kernels.frozen import FrozenLoras, split_columns

# Far below the square of any LoRA's output, so that logits do not depend on the outputs' scale.
_EPS = 1e-12


def mix_chosen(y: Tensor, x: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A frozen layer's output with n LoRAs for each sequence.

    Args:
        y: the output, ``(S, T, out)``.
        x: the input, ``(S, T, in)``.
        weights: G, ``(S, n)``, or by token ``(S, T, n)``.
        A: down projections, ``(S, n, r, in)``; get no gradient.
        B: up projections transposed, with the scaling inside, ``(S, n, r, out)``; get no gradient.

    Returns:
        ``(S, T, out)`` in the precision of y.
    """
    h = torch.bmm(x.to(A.dtype), A.flatten(1, 2).transpose(1, 2))  # (S, T, n * r)
    by_token = weights[:, None] if weights.dim() == 2 else weights  # (S, T or 1, n)
    scaled = h.unflatten(-1, A.shape[1:3]) * by_token[..., None].to(h.dtype)  # (S, T, n, r)
    return y + torch.bmm(scaled.flatten(2), B.flatten(1, 2).to(scaled.dtype)).to(y.dtype)


def read_own(h: list[Tensor], loras: list[Tensor], e: Tensor) -> tuple[Tensor, Tensor]:
    """What n LoRAs put out for each row, each read by itself and all by the same weights.

    A LoRA's outputs in the M matrices that are read, side by side, are D numbers, read without computing them: with
    ``E = B h``, ``e . E = (B^T e) . h``, and what E varies by takes B's Gram matrix.

    Args:
        h: ``A_m x`` for each matrix, ``(*rows, n, r_m)``.
        loras: its B, the scaling inside, ``(*rows or none, n, out_m, r_m)``.
        e: ``(D,)``.

    Returns:
        ``e . E_i`` with E_i normalised, LayerNorm without affine, and ``log |E_i|``: each ``(*rows, n)``.
    """
    widths = [B.shape[-2] for B in loras]
    scores, means, within = [], [], []
    for one, B, part in zip(h, loras, e.split(widths), strict=True):
        score, mean, spread = _of_matrix(one, B, part)
        scores.append(score)
        means.append(mean)
        within.append(spread)
    return _normalised(scores, means, within, widths, e)


def read_own_of_all(h: list[Tensor], loras: list[FrozenLoras], e: Tensor) -> tuple[Tensor, Tensor]:
    """The same of K LoRAs side by side, ``h (*rows, R_m)``; one that a matrix lacks puts out zeros there."""
    widths = [len(frozen.B) for frozen in loras]
    scores, means, within = [], [], []
    for one, frozen, part in zip(h, loras, e.split(widths), strict=True):
        runs = [
            _of_matrix(columns, B.movedim(0, 1), part)
            for columns, B in zip(split_columns(one, frozen.ranks), split_columns(frozen.B, frozen.ranks), strict=True)
        ]
        score, mean, spread = (torch.cat(parts, dim=-1) for parts in zip(*runs, strict=True))
        scores.append(score)
        means.append(mean)
        within.append(spread)
    return _normalised(scores, means, within, widths, e)


def _of_matrix(h: Tensor, B: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``E = B h`` in one matrix: ``e . E``, its mean, the squares of what it varies by summed; ``(*rows, n)``."""
    h, B = h.to(e.dtype), B.to(e.dtype)
    pulled = torch.einsum("...or,o->...r", B, e)  # (..., n, r)
    column_means = B.mean(dim=-2)  # (..., n, r)
    C = B - column_means[..., None, :]  # (..., n, out, r)
    gram = C.transpose(-1, -2) @ C  # (..., n, r, r)
    spread = (torch.einsum("...r,...rs->...s", h, gram) * h).sum(dim=-1)
    return (h * pulled).sum(dim=-1), (h * column_means).sum(dim=-1), spread


def _normalised(
    scores: list[Tensor], means: list[Tensor], within: list[Tensor], widths: list[int], e: Tensor
) -> tuple[Tensor, Tensor]:
    mean = sum((w * m for w, m in zip(widths, means, strict=True)), e.new_zeros(())) / len(e)  # (*rows, n)
    squares = sum((s + w * (m - mean).square() for w, m, s in zip(widths, means, within, strict=True)), e.new_zeros(()))
    products = sum(scores, e.new_zeros(())) - mean * e.sum()
    products = products * torch.rsqrt(squares / len(e) + _EPS)
    return products, 0.5 * torch.log(squares + len(e) * mean.square() + _EPS)
