"""Experts side by side, hidden unit by hidden unit: which unit of one is which of another, and their average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.backbones.moe import Expert


def match_units(reference: Expert, other: Expert) -> Tensor:
    """For each hidden unit of ``reference`` the unit of ``other`` that takes its place, ``(ff,)``.

    The order of the hidden units changes nothing that an expert computes. The match is the one with the least summed
    squared distance between the units' weights (rows of gate and up, columns of down, their biases).

    Source: weight matching of Ainsworth, Hayase & Srinivasa 2023 (Git Re-Basin), as M-SMoE uses it (Li et al. 2024).
    """
    from scipy.optimize import linear_sum_assignment

    gains = _units(reference) @ _units(other).T  # (ff, ff)
    _, columns = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(other.up.device)


@torch.no_grad()
def average(experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """The weighted mean of experts whose hidden units are matched to those of the first, in the first's dtype.

    Args:
        experts: of one shape.
        weights: not negative; where all are 0 the experts count the same.
    """
    reference, total = experts[0], sum(weights)
    mean = {name: torch.zeros_like(matrix, dtype=torch.float64) for name, matrix in reference.matrices.items()}
    for expert, weight in zip(experts, weights, strict=True):
        share = weight / total if total > 0 else 1 / len(experts)
        matched = expert.matrices if expert is reference else _reorder(expert, match_units(reference, expert))
        for name, matrix in matched.items():
            mean[name] += share * matrix.double()
    rounded = {name: matrix.to(reference.up.dtype) for name, matrix in mean.items()}
    return Expert(activation=reference.activation, **rounded)


def _units(expert: Expert) -> Tensor:
    """The weights of each hidden unit in one row, ``(ff, numbers)``, in float64."""
    named = expert.matrices
    rows = [named[name] for name in ("gate", "up") if name in named]
    biases = [named[name][:, None] for name in ("gate_bias", "up_bias") if name in named]
    return torch.cat([one.detach().double() for one in (*rows, named["down"].T, *biases)], dim=1)


def _reorder(expert: Expert, order: Tensor) -> dict[str, Tensor]:
    """The expert's matrices with its hidden units in that order."""
    named = expert.matrices
    return {
        name: matrix[:, order] if name == "down" else matrix if name == "down_bias" else matrix[order]
        for name, matrix in named.items()
    }
