"""Which expert is most like another, and does its work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lamella.aligners import Aligner
from lamella.backbones.moe import MoELayer
from lamella.errors import LamellaError
from lamella.similarity.compression.choosing import Aligners, train_aligners
from lamella.similarity.compression.distances import choose_measure, directed
from lamella.similarity.compression.folding import fold
from lamella.similarity.compression.layers import find_experts, native_layers
from lamella.similarity.screening.pairs import Name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Route:
    """Where an expert's tokens go: to ``target``, a (layer, expert) of this or another layer, behind ``aligner``."""

    target: Name
    aligner: Aligner | None = None

    def work(self, layers: Mapping[int, MoELayer]) -> Callable[[Tensor], Tensor]:
        """What does the tokens' work, ``(N, h) -> (N, h)``; a linear aligner is folded in as it is now.

        Raises:
            LamellaError: the model has no such target.
        """
        expert = find_experts(layers, [self.target])[self.target]
        aligner = self.aligner
        if aligner is None or aligner.kind == "identity":
            return expert
        if aligner.kind == "layernorm":
            aligner = copy.deepcopy(aligner).to(expert.down.device, expert.down.dtype)
            return lambda x: expert(aligner(x))
        return fold(expert, aligner.matrix.to(expert.up.device), aligner.bias.to(expert.up.device))


def find_routes(
    similarity: pd.DataFrame,
    model: nn.Module,
    experts: Sequence[Name],
    *,
    aligner: Aligners | None = None,
    across_layers: bool = True,
    measure: str | None = None,
) -> dict[Name, Route]:
    """For each of ``experts`` the most similar expert that is none of them.

    Args:
        similarity: a table of ordered pairs from ``align`` or ``screen``.
        model: the model it was made of.
        experts: the (layer, expert) whose tokens have to go elsewhere.
        aligner: trains the aligners of the pairs (source, target) that it is given, as
            ``partial(fit_aligners, capture, model)`` does.
        across_layers: whether the target may lie in any layer, or only in the expert's own.
        measure: column of ``similarity``; by default "identity_nmse" (without aligner), "nmse" (with), or
            "cka_distance" where the table is a screen.

    Raises:
        LamellaError: the table has no pair for an expert, is about other experts or holds NaN; no aligner of a pair.
    """
    layers = native_layers(model)
    find_experts(layers, experts)
    keys = [(layer.index, expert) for layer in layers.values() for expert in range(layer.num_experts)]
    distances = directed(similarity, keys, choose_measure(similarity, measure, aligned=aligner is not None))
    closed = set(experts)
    targets: dict[Name, Name] = {}
    for source in experts:
        row = distances[keys.index(source)]
        reach = {
            target: float(distance)
            for target, distance in zip(keys, row, strict=True)
            if target not in closed and (across_layers or target[0] == source[0])
        }
        target = min(reach, key=reach.__getitem__, default=source)
        if reach.get(target, torch.inf) == torch.inf:
            raise LamellaError(
                f"The table has no expert that could stand in for expert {source[1]} of layer {source[0]}; measure it "
                "against one that stays, or let targets lie in other layers with across_layers=True."
            )
        targets[source] = target
    trained = {} if aligner is None else train_aligners(aligner, list(targets.items()))
    return {source: Route(target, trained.get((source, target))) for source, target in targets.items()}
