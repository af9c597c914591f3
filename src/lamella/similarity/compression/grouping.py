"""Which experts come together: by average linkage of their distances, or the least used into the most used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError

Distances = npt.NDArray[np.float64]
Step = tuple[int, int]  # the group that stays and the group that joins it, each named by its first member


def linkage(distances: Distances) -> Iterator[Step]:
    """Joins the two closest groups, again and again; how far two groups are is the mean over their members' pairs.

    Args:
        distances: ``(n, n)``, symmetric; infinite where two members may not come together, and then no two groups that
            hold them.

    Source: average linkage, as HC-SMoE clusters experts (Chen et al. 2025, arXiv 2410.08589).
    """
    between = distances.copy()
    np.fill_diagonal(between, np.inf)
    sizes = np.ones(len(between))
    while len(between) > 1:
        keep, gone = sorted(int(at) for at in np.unravel_index(int(between.argmin()), between.shape))
        if not np.isfinite(between[keep, gone]):
            return
        mean = (sizes[keep] * between[keep] + sizes[gone] * between[gone]) / (sizes[keep] + sizes[gone])
        sizes[keep] += sizes[gone]
        between[keep], between[:, keep] = mean, mean
        between[gone], between[:, gone] = np.inf, np.inf
        between[keep, keep] = np.inf
        yield keep, gone


def least_into_most_used(shares: Sequence[float], layers: Sequence[int]) -> Iterator[Step]:
    """The least used expert of all joins the most used one of its layer, then the next; n shares and layers."""
    ordered = sorted(range(len(shares)), key=shares.__getitem__)
    most = {layers[at]: at for at in ordered}
    for at in ordered:
        if at != most[layers[at]]:
            yield most[layers[at]], at


def join_until(steps: Iterable[Step], sizes: Sequence[int], extra: int, allowed: int) -> list[list[int]]:
    """Groups of members, joined step by step until what they store is at most ``allowed`` numbers.

    Args:
        steps: which groups to join.
        sizes: what each of the n members stores alone.
        extra: what a member of a group stores beside the group's one expert (its aligner).
        allowed: numbers.

    Raises:
        LamellaError: the steps end before that.
    """
    groups = {at: [at] for at in range(len(sizes))}
    stored, left = sum(sizes), iter(steps)
    while stored > allowed:
        step = next(left, None)
        if step is None or extra >= sizes[step[1]]:
            raise LamellaError(
                f"Experts of {allowed:,} parameters are too few: {stored:,} of {sum(sizes):,} are left when all "
                "that may come together have, with what aligners store. Raise the budget, measure more pairs, let "
                "neighbouring layers share with across_layers=True, or take smaller aligners (low-rank, identity)."
            )
        keep, gone = step
        groups[keep] += groups.pop(gone)
        stored += extra - sizes[gone]
    return list(groups.values())


def medoid(group: Sequence[int], distances: Distances) -> int:
    """The member to which the others of its group are closest; distances from source to target."""
    return min(group, key=lambda one: sum(distances[other, one] for other in group if other != one))
