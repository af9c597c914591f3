"""The methods of a compression: which experts each of them brings together at a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from lamella.aligners import Aligner
from lamella.backbones.moe import MoELayer
from lamella.errors import LamellaError
from lamella.similarity.compression.pool import replacement_parameters
from lamella.similarity.matching import weight_distance
from lamella.similarity.pairs import NAMES, Name, Pair

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture


Method = Literal["similarity", "random", "usage", "weight-distance"]
METHODS: tuple[Method, ...] = get_args(Method)
Aligners = Callable[[Sequence[Pair]], Mapping[Pair, Aligner]]  # trains those of the pairs that are asked for


@dataclass(frozen=True)
class Settings:
    """How experts come together and what they become; see the arguments of ``compress``."""

    method: Method = "similarity"
    merge: bool = True
    aligner: Aligners | None = None
    across_layers: bool = False
    measure: str | None = None
    capture: Capture | None = None
    seed: int = 0

    @cached_property
    def shares(self) -> Mapping[Name, float] | None:
        """How much each expert was used; None where nobody counted."""
        return None if self.capture is None else self.capture.shares

    def shares_of(self, keys: Sequence[Name]) -> list[float]:
        """How much these experts were used.

        Raises:
            LamellaError: nobody counted.
        """
        if self.shares is None:
            raise LamellaError('method="usage" goes by what the routers chose; give capture=, the counts of a text.')
        return [self.shares[key] for key in keys]


@dataclass(frozen=True, eq=False)
class Choice:
    """Who comes together in which order; the budget says how far.

    Attributes:
        keys: the n experts.
        sizes: numbers that each of them stores.
        steps: all of the joins, by position in ``keys``.
        distances: ``(n, n)`` from source to target, weighted by the source's share; None where usage alone decides.
        extra: numbers that a replacement stores beside its target; counted for those that need none, too.
        measure: the column of the table that decides; None where no table does.
    """

    keys: Sequence[Name]
    sizes: Sequence[int]
    steps: Sequence[Step]
    distances: Distances | None
    extra: int = 0
    measure: str | None = None

    def groups(self, budget: float) -> list[list[Name]]:
        """Groups that store at most that share of all; in each first the expert that stands for the others.

        Raises:
            LamellaError: not all of the steps together get there.
        """
        allowed = round(budget * sum(self.sizes))  # whole numbers: a third of them is a third, whatever floats say
        joined = join_until(self.steps, self.sizes, self.extra, allowed)
        return [[self.keys[at] for at in _representative_first(group, self.distances)] for group in joined]


def choose(layers: Sequence[MoELayer], keys: Sequence[Name], table: pd.DataFrame | None, settings: Settings) -> Choice:
    """The choice of a method.

    Raises:
        LamellaError: the method lacks its table or its counts, or the table is not about these experts.
    """
    by_index = {layer.index: layer for layer in layers}
    sizes = [by_index[layer].experts[expert].parameters for layer, expert in keys]
    if settings.method == "usage":
        steps = list(least_into_most_used(settings.shares_of(keys), [layer for layer, _ in keys]))
        return Choice(keys, sizes, steps, None)
    distances, measure = _distances(layers, keys, table, settings)
    if settings.shares is not None and settings.method != "random":
        distances = weighted_by_usage(distances, settings.shares_of(keys))
    steps = list(linkage(within_reach(cheaper_way(distances), keys, settings.across_layers)))
    extra = 0
    if settings.aligner is not None:
        joined = ([keys[at] for at in _representative_first(step, distances)] for step in steps)
        aligned = ((source, target) for target, source in joined if is_used(source, settings.shares))
        if (pair := next(aligned, None)) is not None:  # what the first pair stores, all do
            target = by_index[pair[1][0]].experts[pair[1][1]]
            extra = replacement_parameters(target, train_aligners(settings.aligner, [pair])[pair])
    return Choice(keys, sizes, steps, distances, extra, measure)


def train_aligners(aligner: Aligners, pairs: Sequence[Pair]) -> Mapping[Pair, Aligner]:
    """The aligners of the pairs.

    Raises:
        LamellaError: a pair has none, as a source with too few samples has not.
    """
    trained = aligner(pairs) if pairs else {}
    if missing := [pair for pair in pairs if pair not in trained]:
        (layer, expert), (to_layer, to_expert) = missing[0]
        raise LamellaError(
            f"There is no aligner from expert {expert} of layer {layer} to expert {to_expert} of layer {to_layer}; "
            "capture more text for experts with too few samples, or do without aligners."
        )
    return trained


def _distances(
    layers: Sequence[MoELayer], keys: Sequence[Name], table: pd.DataFrame | None, settings: Settings
) -> tuple[Distances, str | None]:
    """``(n, n)`` from source to target, and the table's column they are from."""
    if settings.method == "random":
        return random_distances(len(keys), settings.seed), None
    if settings.method == "weight-distance":
        if table is not None and "weight_distance" in table.columns and table["weight_distance"].notna().all():
            return directed(table, keys, "weight_distance"), "weight_distance"
        reach = within_reach(np.zeros((len(keys), len(keys))), keys, settings.across_layers)
        return weight_distances(layers, keys, reach), None
    if table is None:
        raise LamellaError('method="similarity" goes by a table of align or screen; give it as similarity.')
    measure = choose_measure(table, settings.measure, aligned=settings.aligner is not None)
    return directed(table, keys, measure), measure


def _representative_first(group: Sequence[int], distances: Distances | None) -> list[int]:
    """The group with the member first to which the others are closest; a group by usage has its most used there."""
    first = group[0] if distances is None else medoid(group, distances)
    return [first, *(other for other in group if other != first)]


_SCREENED = "cka_distance"
_SIDES = ("source", "target")


def choose_measure(table: pd.DataFrame, measure: str | None, aligned: bool) -> str:
    """The column to go by: of an alignment the error with aligner or with none, of a screen the CKA distance.

    Raises:
        LamellaError: the table is not a table of ordered pairs, or lacks the column.
    """
    if missing := [name for name in NAMES if name not in table.columns]:
        raise LamellaError(
            f"The table of similarities lacks the column {missing[0]}; give the result of align or screen."
        )
    wanted = measure or (("nmse" if aligned else "identity_nmse") if "nmse" in table.columns else _SCREENED)
    if wanted not in table.columns:
        raise LamellaError(f"The table of similarities has no column {wanted}; it has {', '.join(table.columns)}.")
    return wanted


def directed(table: pd.DataFrame, keys: Sequence[Name], measure: str) -> Distances:
    """``(n, n)``, entry (source, target): the mean of ``measure`` over seeds; infinite where it was not measured.

    Raises:
        LamellaError: the table names experts that the model lacks, holds NaN, mixes aligners, or is about none of them.
    """
    pairs = table[table["kind"] == "pair"] if "kind" in table.columns else table
    if measure == "nmse" and "aligner" in pairs.columns and pairs["aligner"].nunique() > 1:
        kinds = ", ".join(sorted(pairs["aligner"].unique()))
        raise LamellaError(f"The table holds errors of several aligners ({kinds}); keep the rows of one.")
    _check_rows(pairs, keys, measure)
    means = pairs.groupby(NAMES, as_index=False)[measure].mean()
    at = {key: index for index, key in enumerate(keys)}
    sources, targets = (
        [at[key] for key in zip(means[f"{side}_layer"], means[f"{side}_expert"], strict=True)] for side in _SIDES
    )
    distances = np.full((len(keys), len(keys)), np.inf)
    distances[sources, targets] = means[measure]
    if not np.isfinite(distances).any():
        raise LamellaError(f"The table of similarities has no finite {measure} of any pair of this model's experts.")
    return distances


def _check_rows(pairs: pd.DataFrame, keys: Sequence[Name], measure: str) -> None:
    for side in _SIDES:
        named = set(zip(pairs[f"{side}_layer"], pairs[f"{side}_expert"], strict=True))
        if unknown := sorted(named - set(keys)):
            layer, expert = unknown[0]
            raise LamellaError(
                f"The table compares expert {expert} of layer {layer}, which this model does not have; give the table "
                "that was made of this model."
            )
    nan = pairs[pairs[measure].isna()]
    if len(nan):
        layer, expert, to_layer, to_expert = nan[NAMES].iloc[0]
        raise LamellaError(
            f"The {measure} of expert {expert} of layer {layer} by expert {to_expert} of layer {to_layer} is NaN, and "
            f"{len(nan) - 1} more rows are; leave such rows out of the table, or measure them with more samples."
        )


def weighted_by_usage(distances: Distances, shares: Sequence[float]) -> Distances:
    """What it costs to let a target replace a source: the distance, by how many tokens the source gets.

    A source that gets none costs nothing, measured or not: without tokens nothing can be measured.
    """
    share = np.asarray(shares)[:, None]  # (n, 1)
    costs = np.multiply(distances, share, where=np.isfinite(distances), out=np.full_like(distances, np.inf))
    return np.where(share == 0, 0.0, costs)


def is_used(expert: Name, shares: Mapping[Name, float] | None) -> bool:
    """Whether any token went to the expert, as far as anybody counted."""
    return shares is None or shares[expert] > 0


def cheaper_way(distances: Distances) -> Distances:
    """For each two experts the better direction: one of them will replace the other."""
    return np.minimum(distances, distances.T)


def within_reach(distances: Distances, keys: Sequence[Name], across_layers: bool) -> Distances:
    """The distances, infinite beyond an expert's own layer or, across layers, beyond the layers next to it."""
    order = {layer: at for at, layer in enumerate(sorted({layer for layer, _ in keys}))}
    place = np.array([order[layer] for layer, _ in keys])
    return np.where(np.abs(place[:, None] - place[None]) <= int(across_layers), distances, np.inf)


def random_distances(count: int, seed: int) -> Distances:
    """``(count, count)``, symmetric, independent and uniform: the baseline that knows nothing."""
    drawn = np.random.default_rng(seed).random((count, count))
    upper = np.triu(drawn, 1)
    return upper + upper.T


def weight_distances(layers: Sequence[MoELayer], keys: Sequence[Name], reach: Distances) -> Distances:
    """``(n, n)``: ``weight_distance`` of every pair that is in reach (finite in ``reach``)."""
    by_index = {layer.index: layer for layer in layers}
    distances = np.full((len(keys), len(keys)), np.inf)
    for one, (layer, expert) in enumerate(keys):
        first = by_index[layer].experts[expert]
        for other in range(one + 1, len(keys)):
            if not np.isfinite(reach[one, other]):
                continue
            second = by_index[keys[other][0]].experts[keys[other][1]]
            distances[one, other] = distances[other, one] = weight_distance(first, second)
    return distances


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
                f"A budget of {allowed / sum(sizes):.3g} of the experts' parameters cannot be reached: {stored:,} of "
                f"{sum(sizes):,}, {stored / sum(sizes):.1%}, are left when all that may come together have, with what "
                f"aligners store. Give a budget of {math.ceil(1000 * stored / sum(sizes)) / 1000:g} or more, measure "
                "more pairs, let neighbouring layers share with across_layers=True, or take smaller aligners "
                "(low-rank, identity)."
            )
        keep, gone = step
        groups[keep] += groups.pop(gone)
        stored += extra - sizes[gone]
    return list(groups.values())


def medoid(group: Sequence[int], distances: Distances) -> int:
    """The member to which the others of its group are closest; distances from source to target."""
    return min(group, key=lambda one: sum(distances[other, one] for other in group if other != one))
