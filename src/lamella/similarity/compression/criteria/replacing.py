"""Experts whose tokens get something else, with the router as it is: a constant, or another expert of the layer."""

from collections.abc import Mapping

from torch import Tensor

from lamella.similarity.compression.calibration import LayerSample
from lamella.similarity.compression.criteria.registry import Ranking, criterion, lowest_first


@criterion("stand-in", "replace", power=2)
def stand_in(sample: LayerSample, seed: int) -> Ranking:
    """``sum_{x in X_j} g_j(x)^2 |f_j(x) - f_e(x)|^2``, e the expert that is left for which that is least.

    Always the expert goes next whose loss adds the least to the sum over all that are gone; what it stood in for finds
    another.
    """
    return least_damage(replacement_damage(sample))


def least_damage(damage: Tensor, aligners: Mapping[tuple[int, int], tuple[Tensor, Tensor]] | None = None) -> Ranking:
    """``damage[j, e]`` is what it costs that e does the work of j, ``(E, E)``; behind the aligner of (j, e), if any."""
    left, order, costs, total = list(range(len(damage))), [], [], 0.0
    while len(left) > 1:
        totals = {gone: _total(damage, [one for one in left if one != gone]) for gone in left}
        gone = min(left, key=totals.__getitem__)
        order.append(gone)
        costs.append(totals[gone] - total)
        total = totals[gone]
        left.remove(gone)

    def groups(count: int) -> list[list[int]]:
        kept = sorted(set(range(len(damage))) - set(order[:count]))
        return assigned(kept, {one: min(kept, key=lambda to: float(damage[one, to])) for one in order[:count]})

    return Ranking(order, costs, groups, aligners=aligners)


def replacement_damage(sample: LayerSample) -> Tensor:
    """``sum_{x in X_j} g_j(x)^2 |f_j(x) - f_e(x)|^2`` for each j and e, ``(E, E)``, 0 on the diagonal."""
    products = sample.products
    own = products.diagonal(dim1=1, dim2=2)  # (N, E)
    apart = (own[:, :, None] + own[:, None, :] - 2 * products).clamp_min(0)  # (N, E, E)
    damage = sample.mean(apart * sample.gates.square()[:, :, None].to(apart))
    return damage.fill_diagonal_(0.0)


def _total(damage: Tensor, kept: list[int]) -> float:
    return float(damage[:, kept].amin(dim=1).sum())


def assigned(kept: list[int], to: dict[int, int]) -> list[list[int]]:
    """Groups with the expert that is kept first, and those that go to it."""
    return [[one, *(gone for gone, target in to.items() if target == one)] for one in kept]


@criterion("mean", "replace", power=2)
def mean_output(sample: LayerSample, seed: int) -> Ranking:
    """``sum_{x in X_j} g_j(x)^2 |f_j(x) - m_j|^2``, m_j the mean of f_j over X_j, which takes the expert's place."""
    squares, means = sample.gates.square(), sample.mean_outputs(_share_of(sample, sample.chosen))
    weighted = sample.mean_outputs(_share_of(sample, squares))  # (E, h)
    total = sample.mean(squares)  # (E,)
    damage = sample.mean(squares * sample.norms.square())
    damage = damage - 2 * total * (weighted * means).sum(1) + total * means.square().sum(1)
    return _constant(damage.clamp_min(0), means)


@criterion("mone", "replace", power=1)
def mone(sample: LayerSample, seed: int) -> Ranking:
    """``|sqrt(var_{x in X_j} f_j(x))| * mean_x g_j(x)``, the variance per feature; the mean output takes the place.

    Source: Zhang et al. 2025, MoNE, arXiv 2507.00390 (output variance times access frequency).
    """
    means = sample.mean_outputs(_share_of(sample, sample.chosen))
    second = sample.mean(sample.chosen * sample.norms.square()) / sample.frequency.clamp_min(1e-30)
    deviation = (second - means.square().sum(1)).clamp_min(0).sqrt()
    return _constant(deviation * sample.mean(sample.gates), means)


def _constant(scores: Tensor, means: Tensor) -> Ranking:
    order = lowest_first(scores)[: len(scores) - 1]
    return Ranking(order, [float(scores[expert]) for expert in order], constants=means)


def _share_of(sample: LayerSample, weights: Tensor) -> Tensor:
    return sample.share[:, None] * weights
