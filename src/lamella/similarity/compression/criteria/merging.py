"""Experts that become their average."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lamella.similarity.compression.calibration import LayerSample
from lamella.similarity.compression.criteria.dropping import reap
from lamella.similarity.compression.criteria.registry import Ranking, criterion, lowest_first
from lamella.similarity.compression.criteria.replacing import assigned
from lamella.similarity.matching import average

_GROUP = 16  # experts of a group of REAM at most


@criterion("merge", "merge", power=2)
def merged(sample: LayerSample, seed: int) -> Ranking:
    """``sum_{x in X_i} g_i(x)^2 |f_i(x) - f_ij(x)|^2`` and the same of j, f_ij the average of both experts.

    Of each two experts the average by usage is made, hidden units matched, and its damage measured. Average linkage
    joins the two groups with the least mean damage.
    """
    squares = sample.share[:, None] * sample.gates.square()  # (N, E)
    damage = np.zeros((sample.num_experts, sample.num_experts))
    experts, usage = [sample.layer.experts[e] for e in range(sample.num_experts)], sample.frequency.tolist()
    with torch.no_grad():
        for i, first in enumerate(experts):
            for j in range(i + 1, sample.num_experts):
                both = average([first, experts[j]], [usage[i], usage[j]])
                for own, expert in ((i, first), (j, experts[j])):
                    here = sample.gates[:, own] != 0
                    error = (expert(sample.x[here]) - both(sample.x[here])).double().square().sum(1)
                    damage[i, j] += float(squares[here, own] @ error)
                damage[j, i] = damage[i, j]
    return _linked(sample, damage, sample.frequency, matched=True)


@criterion("hc-smoe", "merge", power=1)
def hc_smoe(sample: LayerSample, seed: int) -> Ranking:
    """Average linkage by ``|m_i - m_j|``, m the mean output over all tokens; averages by frequency, units as they are.

    Source: Chen et al. 2025, Retraining-Free Merging of Sparse MoE via Hierarchical Clustering, arXiv 2410.08589.
    """
    means = sample.mean_outputs(sample.share[:, None].expand_as(sample.gates))  # (E, h)
    return _linked(sample, torch.cdist(means, means).cpu().numpy(), sample.frequency, matched=False)


@criterion("m-smoe", "merge", power=0)
def m_smoe(sample: LayerSample, seed: int) -> Ranking:
    """The least used go, each to the expert that is kept whose router logits have the nearest direction over the text.

    Averages by frequency, hidden units matched. Published with counts by layer from frequencies over the whole model.

    Source: Li et al. 2024, Merge, Then Compress, arXiv 2310.01334.
    """
    profiles = (sample.routing.logits.double() * sample.share.sqrt()[:, None]).T  # (E, N)
    directions = profiles / profiles.norm(dim=1, keepdim=True).clamp_min(1e-30)
    order = lowest_first(sample.frequency)[:-1]
    alike = directions @ directions.T

    def groups(count: int) -> list[list[int]]:
        kept = sorted(set(range(sample.num_experts)) - set(order[:count]))
        return assigned(kept, {gone: max(kept, key=lambda one: float(alike[gone, one])) for gone in order[:count]})

    return Ranking(order, [float(sample.frequency[one]) for one in order], groups, sample.frequency)


@criterion("ream", "merge", power=1, cuts_router=True)
def ream(sample: LayerSample, seed: int) -> Ranking:
    """The experts with the lowest REAP go, to the centre that takes them first; averages by REAP, units matched.

    The centres are the others. From the highest REAP down each takes its nearest experts that have no centre yet, until
    a group has 16. Nearness is the mean of ``(1 + cos(m_i, m_j)) / 2``, m the mean output over all tokens, and
    ``1 - d / max d``, d the distance of the router's logits over the text, each expert's normalised. The router keeps
    the centres' rows. The published code also matches units by what they put out, and samples layer after layer anew.

    Source: REAM, arXiv 2604.04356, and its published code.
    """
    ranked = reap(sample, seed)
    saliency = sample.mean(sample.gates * sample.norms) / sample.frequency.clamp_min(1e-30)
    means = sample.mean_outputs(sample.share[:, None].expand_as(sample.gates))
    directions = means / means.norm(dim=1, keepdim=True).clamp_min(1e-30)
    profiles = (sample.routing.logits.double() * sample.share.sqrt()[:, None]).T
    profiles = profiles / profiles.norm(dim=1, keepdim=True).clamp_min(1e-30)
    distance = torch.cdist(profiles, profiles)
    alike = (1 + directions @ directions.T) / 4 + (1 - distance / distance.max().clamp_min(1e-30)) / 2

    def groups(count: int) -> list[list[int]]:
        free = set(ranked.order[:count])
        taken = {}
        centres = sorted(set(range(sample.num_experts)) - free, key=lambda one: -float(saliency[one]))
        for centre in centres:
            nearest = sorted(free, key=lambda one: -float(alike[centre, one]))[: _GROUP - 1]
            taken.update(dict.fromkeys(nearest, centre))
            free -= set(nearest)
        return assigned(sorted(centres), taken)

    most = min(len(ranked.order), sample.num_experts - -(-sample.num_experts // _GROUP))
    return Ranking(ranked.order[:most], ranked.costs[:most], groups, saliency)


def _linked(sample: LayerSample, distances: np.ndarray, weights: Tensor, matched: bool) -> Ranking:
    """Groups by average linkage; the most used expert of a group stands first, and the others are gone."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    joins = linkage(squareform(distances, checks=False), method="average")  # (E - 1, 4)
    groups = _after_joins(joins, sample.num_experts, lambda group: sorted(group, key=lambda one: -float(weights[one])))
    order = [
        next(iter({one[0] for one in groups(done)} - {one[0] for one in groups(done + 1)}))
        for done in range(len(joins))
    ]
    return Ranking(order, joins[:, 2].tolist(), groups, weights, matched)


def _after_joins(
    joins: np.ndarray, experts: int, ordered: Callable[[list[int]], list[int]]
) -> Callable[[int], list[list[int]]]:
    def groups(count: int) -> list[list[int]]:
        present = {expert: [expert] for expert in range(experts)}
        for at, (first, second) in enumerate(joins[:count, :2].astype(int).tolist()):
            present[experts + at] = present.pop(first) + present.pop(second)
        return [ordered(group) for group in present.values()]

    return groups
