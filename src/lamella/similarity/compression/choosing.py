"""The methods of a compression: which experts each of them brings together at a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from lamella.aligners import Aligner
from lamella.backbones.moe import MoELayer
from lamella.errors import LamellaError
from lamella.similarity.compression.distances import (
    cheaper_way,
    choose_measure,
    directed,
    is_used,
    random_distances,
    weigh,
    weight_distances,
    within_reach,
)
from lamella.similarity.compression.grouping import Distances, Step, join_until, least_into_most_used, linkage, medoid
from lamella.similarity.compression.pool import stand_in_parameters
from lamella.similarity.screening.pairs import Name, Pair

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["similarity", "random", "usage", "weight-distance"]
METHODS: tuple[Method, ...] = get_args(Method)
Aligners = Callable[[Sequence[Pair]], Mapping[Pair, Aligner]]  # trains those of the pairs that are asked for


@dataclass(frozen=True)
class Setting:
    """How ``compress`` was asked to choose; see its arguments.

    Attributes:
        shares: how much each expert was used; None where nobody counted.
    """

    method: Method
    across_layers: bool
    measure: str | None
    aligner: Aligners | None
    shares: Mapping[Name, float] | None
    seed: int


@dataclass(frozen=True, eq=False)
class Choice:
    """Who comes together in which order; the budget says how far.

    Attributes:
        keys: the n experts.
        sizes: numbers that each of them stores.
        steps: all of the joins, by position in ``keys``.
        distances: ``(n, n)`` from source to target, weighed by the source's share; None where usage alone decides.
        extra: numbers that a stand-in stores beside its target; counted for those that need none, too.
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


def choose(layers: Sequence[MoELayer], keys: Sequence[Name], table: pd.DataFrame | None, setting: Setting) -> Choice:
    """The choice of a method.

    Raises:
        LamellaError: the method lacks its table or its counts, or the table is not about these experts.
    """
    by_index = {layer.index: layer for layer in layers}
    sizes = [by_index[layer].experts[expert].parameters for layer, expert in keys]
    if setting.method == "usage":
        steps = list(least_into_most_used(_shares(setting, keys), [layer for layer, _ in keys]))
        return Choice(keys, sizes, steps, None)
    distances, measure = _distances(layers, keys, table, setting)
    if setting.shares is not None and setting.method != "random":
        distances = weigh(distances, _shares(setting, keys))
    steps = list(linkage(within_reach(cheaper_way(distances), keys, setting.across_layers)))
    extra = 0
    if setting.aligner is not None:
        joined = ([keys[at] for at in _representative_first(step, distances)] for step in steps)
        aligned = ((source, target) for target, source in joined if is_used(source, setting.shares))
        if (pair := next(aligned, None)) is not None:  # what the first pair stores, all do
            layer, expert = pair[1]
            extra = stand_in_parameters(by_index[layer].experts[expert], train_aligners(setting.aligner, [pair])[pair])
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


def _shares(setting: Setting, keys: Sequence[Name]) -> list[float]:
    if setting.shares is None:
        raise LamellaError('method="usage" goes by what the routers chose; give capture=, the counts of a text.')
    return [setting.shares[key] for key in keys]


def _distances(
    layers: Sequence[MoELayer], keys: Sequence[Name], table: pd.DataFrame | None, setting: Setting
) -> tuple[Distances, str | None]:
    """``(n, n)`` from source to target, and the table's column they are from."""
    if setting.method == "random":
        return random_distances(len(keys), setting.seed), None
    if setting.method == "weight-distance":
        if table is not None and "weight_distance" in table.columns and table["weight_distance"].notna().all():
            return directed(table, keys, "weight_distance"), "weight_distance"
        reach = within_reach(np.zeros((len(keys), len(keys))), keys, setting.across_layers)
        return weight_distances(layers, keys, reach), None
    if table is None:
        raise LamellaError('method="similarity" goes by a table of align or screen; give it as similarity.')
    measure = choose_measure(table, setting.measure, aligned=setting.aligner is not None)
    return directed(table, keys, measure), measure


def _representative_first(group: Sequence[int], distances: Distances | None) -> list[int]:
    """The group with the member first to which the others are closest; a group by usage has its most used there."""
    first = group[0] if distances is None else medoid(group, distances)
    return [first, *(other for other in group if other != first)]
