"""Experts that go: the router can choose them no more, and decides among the others.

X_j are the tokens that expert j is given, g_j(x) what the router multiplies its output f_j(x) by.
"""

import torch

from lamella.similarity.compression.calibration import LayerSample, fewest_experts
from lamella.similarity.compression.criteria.registry import Ranking, criterion, dropped_by


@criterion("reconstruction", "drop", power=2)
def reconstruction(sample: LayerSample, seed: int) -> Ranking:
    """``sum_x |sum_j g_j(x) f_j(x) - sum_j g'_j(x) f_j(x)|^2``, g' what the router decides without those that are gone.

    The error that the layer really makes. Always the expert whose loss adds the least to it goes next. So unlike a sum
    over single experts it sees the router's next choice do the work, and two experts that stood in for each other.
    """
    rows = torch.arange(len(sample.x), device=sample.x.device)
    gates, error = sample.gates.clone(), torch.zeros_like(sample.share)
    order: list[int] = []
    costs: list[float] = []
    groups, left = sample.group_of, set(range(sample.num_experts))
    turn = dict.fromkeys(groups, 0)
    while len(left) > fewest_experts(sample.layer):
        candidates = {}
        for expert in sorted(one for one in left if turn[groups[one]] == min(turn.values())):
            here = rows[gates[:, expert] != 0] if sample.is_local else rows
            after = sample.gates_without([*order, expert], here) if len(here) else gates[here]
            now = sample.errors(sample.gates[here] - after, here)
            candidates[expert] = float(sample.share[here] @ (now - error[here])), here, after, now
        gone = min(candidates, key=lambda one: candidates[one][0])
        cost, here, after, now = candidates[gone]
        gates[here], error[here] = after, now
        order.append(gone)
        costs.append(cost)
        left.remove(gone)
        turn[groups[gone]] += 1
    return Ranking(order, costs)


@criterion("energy", "drop", power=2)
def energy(sample: LayerSample, seed: int) -> Ranking:
    """``sum_{x in X_j} g_j(x)^2 |f_j(x)|^2``: the damage where nothing does the expert's work."""
    return dropped_by(sample, sample.mean((sample.gates * sample.norms).square()))


@criterion("reap", "drop", power=1)
def reap(sample: LayerSample, seed: int) -> Ranking:
    """``1/|X_j| sum_{x in X_j} g_j(x) |f_j(x)|``.

    Source: Lasby et al. 2025, REAP the Experts, arXiv 2510.13999, equation 9.
    """
    return dropped_by(sample, sample.mean(sample.gates * sample.norms) / sample.frequency.clamp_min(1e-30))


@criterion("frequency", "drop", power=0)
def frequency(sample: LayerSample, seed: int) -> Ranking:
    """``|X_j|``, as a share of the tokens. Source: the baseline of REAP's authors, arXiv 2510.13999."""
    return dropped_by(sample, sample.frequency)


@criterion("ean", "drop", power=1)
def ean(sample: LayerSample, seed: int) -> Ranking:
    """``sum_{x in X_j} |f_j(x)|``, the expert activation norm.

    Source: Jaiswal et al. 2025, Finding Fantastic Experts in MoEs, arXiv 2504.05586.
    """
    return dropped_by(sample, sample.mean(sample.chosen * sample.norms))


@criterion("man", "drop", power=1)
def man(sample: LayerSample, seed: int) -> Ranking:
    """``1/|X_j| sum_{x in X_j} |f_j(x)|``, the mean activation norm, which knows no gate.

    Source: Liu et al. 2026, How to Score Experts for One-Shot MoE Expert Pruning, arXiv 2606.15716.
    """
    return dropped_by(sample, sample.mean(sample.chosen * sample.norms) / sample.frequency.clamp_min(1e-30))


@criterion("aimer", "drop", power=0)
def aimer(sample: LayerSample, seed: int) -> Ranking:
    """``-mean |w| / sqrt(mean w^2)`` over all weights w of the expert: the highest ratio goes first. It reads no text.

    Source: Liu et al. 2026, AIMER, arXiv 2603.18492.
    """
    scores = []
    for expert in range(sample.num_experts):
        weights = torch.cat([one.flatten().double() for one in sample.layer.experts[expert].matrices.values()])
        scores.append(-weights.abs().mean() / weights.square().mean().sqrt())
    return dropped_by(sample, torch.stack(scores).detach())


@criterion("random", "drop", power=0)
def random(sample: LayerSample, seed: int) -> Ranking:
    """Uniform in 0 to 1: the baseline that knows nothing."""
    generator = torch.Generator().manual_seed(seed * 10_007 + sample.layer.index)
    return dropped_by(sample, torch.rand(sample.num_experts, generator=generator, dtype=torch.float64))
