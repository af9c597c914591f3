"""How many experts each layer gives up: as many in each, or the cheapest of the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from lamella.backbones.moe import MoELayer
from lamella.errors import LamellaError
from lamella.similarity.compression.calibration import fewest_experts, router_groups
from lamella.similarity.compression.criteria import Criterion, Ranking

Scope = Literal["layer", "model"]


def check_budget(budget: float, scope: str) -> None:
    """What can be refused before anything is computed.

    Raises:
        LamellaError: a budget outside 0 to 1, or an unknown scope.
    """
    if not 0 < budget <= 1:
        raise LamellaError(f"budget={budget} is not a share of the experts to keep; give 0 < budget <= 1.")
    if scope not in get_args(Scope):
        raise LamellaError(f"scope={scope!r} is not one of {', '.join(get_args(Scope))}.")


def experts_to_go(
    layers: Sequence[MoELayer],
    rankings: Mapping[int, Ranking],
    criterion: Criterion,
    budget: float,
    scope: Scope,
    gradients: Mapping[int, float] | None,
) -> dict[int, int]:
    """How many experts each layer gives up, by index.

    A router that is cut keeps at least as many experts as a token gets, and as many in each of its groups.

    Args:
        layers: all of the model.
        rankings: by layer index, of the criterion.
        criterion: whose costs are compared.
        budget: share of the experts to keep at most.
        scope: "layer", that share of each layer; "model", of all layers together: always the expert goes next that
            costs least, which leaves layers with different numbers.
        gradients: of ``layer_gradients``; None compares costs as they are.

    Raises:
        LamellaError: the budget cannot be reached, or would leave a router with as many experts as it cannot have.
    """
    if scope == "layer":
        return {layer.index: _of_layer(layer, rankings[layer.index], criterion, budget) for layer in layers}
    total = sum(layer.num_experts for layer in layers)
    wanted = total - _kept(budget, total)
    gone = dict.fromkeys((layer.index for layer in layers), 0)
    rounds = {layer.index: router_groups(layer) if criterion.cuts_router else 1 for layer in layers}
    while (have := sum(gone.values())) < wanted:
        following = {}
        for index, done in gone.items():
            costs = rankings[index].costs[done : done + rounds[index]]
            if len(costs) == rounds[index]:
                scale = 1.0 if gradients is None else gradients[index] ** (criterion.power / 2)
                following[index] = scale * sum(costs) / len(costs)
        if not following:
            least = math.ceil(1000 * (total - have) / total) / 1000
            raise LamellaError(
                f"A budget of {budget:g} keeps {_kept(budget, total)} of {total} experts, but at most {have} can go by "
                f"{criterion.name}, as a layer keeps as many as its router needs; give a budget of {least:g} or more."
            )
        cheapest = min(following, key=following.__getitem__)
        gone[cheapest] += rounds[cheapest]
    return gone


def _of_layer(layer: MoELayer, ranking: Ranking, criterion: Criterion, budget: float) -> int:
    experts = layer.num_experts
    kept = _kept(budget, experts)
    would = f"A budget of {budget:g} keeps {kept} of the {experts} experts of layer {layer.index}"
    fewest = fewest_experts(layer) if criterion.cuts_router else experts - len(ranking.order)
    if kept < max(1, fewest):
        raise LamellaError(
            f"{would}, whose router needs {fewest} ({layer.top_k} a token); give a budget of "
            f"{math.ceil(1000 * fewest / experts) / 1000:g} or more."
        )
    groups = router_groups(layer)
    if criterion.cuts_router and kept % groups:
        fitting = kept - kept % groups, kept - kept % groups + groups
        raise LamellaError(
            f"{would}, whose router has {groups} groups of as many experts each; give a budget that keeps "
            f"{fitting[0]} or {fitting[1]}, {fitting[0] / experts:g} or {fitting[1] / experts:g}."
        )
    return experts - kept


def _kept(budget: float, experts: int) -> int:
    return math.floor(budget * experts + 1e-9)  # a third of three is one, whatever floats say
