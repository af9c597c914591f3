"""Experts side by side, hidden unit by hidden unit: which unit is which, how far their weights are apart, their mean.

The order of the hidden units changes nothing that an expert computes, so that units are matched before they are
compared: the match is the one with the least summed squared distance between the units' weights, each the rows of gate
and up with their biases and the column of down.

Source: weight matching of Ainsworth, Hayase & Srinivasa 2023 (Git Re-Basin), as M-SMoE uses it (Li et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.backbones.moe import Expert


@torch.no_grad()
def weight_distance(first: Expert, second: Expert) -> float:
    """``sqrt(sum |a - P b|^2 / (sum |a|^2 + sum |b|^2))``, P the best matching of the second's hidden units.

    It is symmetric, exactly 0 for an expert with its hidden units in another order, 1 for weights that have nothing in
    common, at most sqrt(2). Where one expert has more hidden units, those without a partner count in full.
    """
    units, others = _units(first, torch.float32), _units(second, torch.float32)
    matched, partners = _assign(units @ others.T)
    apart = _energy(units[matched] - others[partners]) + _energy(_without(units, matched))
    apart += _energy(_without(others, partners))
    total = _energy(units) + _energy(others)
    if first.down_bias is not None and second.down_bias is not None:
        apart += _energy(first.down_bias.float() - second.down_bias.float())
        total += _energy(first.down_bias) + _energy(second.down_bias)
    return float((apart / total) ** 0.5) if total else 0.0


def match_units(reference: Expert, other: Expert) -> Tensor:
    """For each hidden unit of ``reference`` the unit of ``other`` that takes its place, ``(ff,)``."""
    _, partners = _assign(_units(reference, torch.float64) @ _units(other, torch.float64).T)
    return partners.to(other.up.device)


@torch.no_grad()
def average(experts: Sequence[Expert], weights: Sequence[float], matched: bool = True) -> Expert:
    """The weighted mean of experts whose hidden units are matched to those of the first, in the first's dtype.

    Args:
        experts: of one shape.
        weights: not negative; where all are 0 the experts count the same.
        matched: whether units are matched at all.
    """
    reference, total = experts[0], sum(weights)
    mean = {name: torch.zeros_like(matrix, dtype=torch.float64) for name, matrix in reference.matrices.items()}
    for expert, weight in zip(experts, weights, strict=True):
        share = weight / total if total > 0 else 1 / len(experts)
        as_is = expert is reference or not matched
        matrices = expert.matrices if as_is else _reorder(expert, match_units(reference, expert))
        for name, matrix in matrices.items():
            mean[name] += share * matrix.double()
    rounded = {name: matrix.to(reference.up.dtype) for name, matrix in mean.items()}
    return Expert(activation=reference.activation, **rounded)


def _units(expert: Expert, dtype: torch.dtype) -> Tensor:
    """The weights of each hidden unit in one row, ``(ff, numbers)``."""
    named = expert.matrices
    rows = [named[name] for name in ("gate", "up") if name in named]
    biases = [named[name][:, None] for name in ("gate_bias", "up_bias") if name in named]
    return torch.cat([one.detach().to(dtype) for one in (*rows, named["down"].T, *biases)], dim=1)


def _assign(gains: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the assignment with the largest summed gain."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _reorder(expert: Expert, order: Tensor) -> dict[str, Tensor]:
    """The expert's matrices with its hidden units in that order."""
    return {
        name: matrix[:, order] if name == "down" else matrix if name == "down_bias" else matrix[order]
        for name, matrix in expert.matrices.items()
    }


def _without(rows: Tensor, used: Tensor) -> Tensor:
    left = torch.ones(len(rows), dtype=torch.bool)
    left[used] = False
    return rows[left.to(rows.device)]


def _energy(matrix: Tensor) -> float:
    return float(matrix.detach().double().square().sum())
