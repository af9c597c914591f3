"""What outputs alone say of two experts: linear CKA, and the error that no aligner before the target can beat."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.backbones.moe import Expert


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear CKA ``(...)`` of two representations ``(..., n, d1)`` and ``(..., n, d2)`` of the same n tokens, centred.

    1 for representations that are equal up to rotation and scale, 0 for unrelated ones, NaN where one does not vary.
    It is computed from ``d x d`` or from ``n x n`` products, whichever are smaller: O(n d min(n, d)).

    Source: linear centred kernel alignment, Kornblith et al., 2019, arXiv 1905.00414.
    """
    if first.shape[-2] > max(first.shape[-1], second.shape[-1]):
        cross, one, two = (_energy(a.mT @ b) for a, b in ((first, second), (first, first), (second, second)))
    else:
        left, right = first @ first.mT, second @ second.mT  # (..., n, n)
        cross, one, two = (left * right).sum((-2, -1)), _energy(left), _energy(right)
    return cross / (one * two).sqrt()


def centred(rows: Tensor, real: Tensor) -> Tensor:
    """``rows (..., n, d)`` less their mean over the real ones ``(..., n, 1)``; the others become zero."""
    mean = (rows * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)  # (..., 1, d)
    return torch.where(real, rows - mean, 0.0)


def _energy(matrix: Tensor) -> Tensor:
    return matrix.square().sum((-2, -1))


def unreachable_directions(down: Tensor) -> Tensor:
    """An orthonormal basis ``(d, d - rank)``, float64, of the directions that no output of ``down (d, ff)`` has.

    Whatever the expert's input, its output less its bias lies in the column space of its down-projection; these are
    the directions orthogonal to that space. Only a dependence to the last bits of float64 counts as a lower rank.
    """
    matrix = down.detach().double()
    d, ff = matrix.shape
    basis, triangle = torch.linalg.qr(matrix, mode="complete")  # (d, d), (d, ff)
    rank = min(d, ff)
    diagonal = triangle.diagonal().abs()
    precision = torch.finfo(torch.float64).eps * max(d, ff)
    if diagonal.numel() and diagonal.min() <= precision * diagonal.max():
        # without pivoting a small diagonal says that the rank may be lower, but not by how much
        basis, values, _ = torch.linalg.svd(matrix, full_matrices=True)
        rank = int((values > precision * values.max()).sum())
    return basis[:, rank:]  # (d, d - rank)


def floor_energy(outputs: Tensor, target: Expert, directions: Tensor) -> Tensor:
    """Squared error ``(..., n)`` that is left of every row of ``outputs (..., n, d)`` whatever the target is given.

    Args:
        outputs: what the source puts out.
        target: its ``down_bias`` is all that it can put out in ``directions``.
        directions: `unreachable_directions` of the target's down-projection, ``(d, d - rank)``.
    """
    if target.down_bias is not None:
        outputs = outputs - target.down_bias.detach().to(outputs)  # (..., n, d)
    return (outputs @ directions.to(outputs)).square().sum(-1)  # (..., n)
