"""Linear centred kernel alignment (Kornblith et al., 2019, arXiv 1905.00414)."""

import torch
from torch import Tensor


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Linear CKA ``(...)`` of two representations ``(..., n, d1)`` and ``(..., n, d2)`` of the same n tokens, centred.

    1 for representations that are equal up to rotation and scale, 0 for unrelated ones, NaN where one does not vary.
    It is computed from ``d x d`` or from ``n x n`` products, whichever are smaller: O(n d min(n, d)).
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
