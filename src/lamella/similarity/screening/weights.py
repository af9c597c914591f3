"""How far the weights of two experts are apart, whatever the order of their hidden units."""

import torch
from torch import Tensor

from lamella.backbones.moe import Expert


@torch.no_grad()
def weight_distance(first: Expert, second: Expert) -> float:
    """``sqrt(sum |a - P b|^2 / (sum |a|^2 + sum |b|^2))``, P the best matching of the second's hidden units.

    A hidden unit is its row of up and gate with their biases and its column of down. It is symmetric, exactly 0 for an
    expert with its hidden units in another order, 1 for weights that have nothing in common, at most sqrt(2). Where
    one expert has more hidden units, those without a partner count in full.
    """
    from scipy.optimize import linear_sum_assignment

    units, others = _units(first), _units(second)
    alike = sum(one @ other.T for one, other in zip(units, others, strict=True))  # (ff1, ff2)
    assert isinstance(alike, Tensor)
    matched, partners = (torch.from_numpy(index) for index in linear_sum_assignment(alike.cpu().numpy(), maximize=True))
    apart = total = 0.0
    for one, other in zip(units, others, strict=True):
        apart += _energy(one[matched] - other[partners]) + _energy(_without(one, matched))
        apart += _energy(_without(other, partners))
        total += _energy(one) + _energy(other)
    if first.down_bias is not None and second.down_bias is not None:
        apart += _energy(first.down_bias.float() - second.down_bias.float())
        total += _energy(first.down_bias) + _energy(second.down_bias)
    return float((apart / total) ** 0.5) if total else 0.0


def _units(expert: Expert) -> list[Tensor]:
    """What belongs to each hidden unit: matrices ``(ff, ...)``, in float32."""
    parts = [expert.up, expert.down.T]
    parts += [expert.gate] if expert.gate is not None else []
    parts += [bias[:, None] for bias in (expert.up_bias, expert.gate_bias) if bias is not None]
    return [part.detach().float() for part in parts]


def _without(rows: Tensor, used: Tensor) -> Tensor:
    left = torch.ones(len(rows), dtype=torch.bool)
    left[used] = False
    return rows[left.to(rows.device)]


def _energy(matrix: Tensor) -> float:
    return float(matrix.detach().double().square().sum())
