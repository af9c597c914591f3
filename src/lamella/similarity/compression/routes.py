"""Which expert does the work of one that is closed: the most similar by a table, as it is or behind an aligner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lamella.aligners import Aligner, LayerNormAligner
from lamella.backbones.moe import Expert, MoELayer, moe_layers
from lamella.errors import LamellaError
from lamella.similarity.compression.pool import fold
from lamella.similarity.pairs import NAMES, Name, Pair

if TYPE_CHECKING:
    import pandas as pd


Work = Callable[[Tensor], Tensor]
Aligners = Callable[[Sequence[Pair]], Mapping[Pair, Aligner]]  # trains those of the pairs that are asked for
Distances = npt.NDArray[np.float64]


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
        if isinstance(aligner, LayerNormAligner):
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
                f"The table has no expert that could replace expert {source[1]} of layer {source[0]}; measure it "
                "against one that stays, or let targets lie in other layers with across_layers=True."
            )
        targets[source] = target
    trained = {} if aligner is None else train_aligners(aligner, list(targets.items()))
    return {source: Route(target, trained.get((source, target))) for source, target in targets.items()}


def native_layers(model: nn.Module) -> dict[int, MoELayer]:
    """The layers of a model by index.

    Raises:
        LamellaError: the model has none, or its experts are an adapter's.
    """
    layers = moe_layers(model)
    if foreign := next((layer for layer in layers if not layer.family.native), None):
        raise LamellaError(
            f"The experts of {foreign.name} are an adapter's; give a model that came with its experts, without adapter."
        )
    return {layer.index: layer for layer in layers}


def find_experts(layers: Mapping[int, MoELayer], names: Sequence[Name]) -> dict[Name, Expert]:
    """Experts by name.

    Raises:
        LamellaError: there is no name, or one that the model does not have.
    """
    if not names:
        raise LamellaError("No expert is named; name experts as (layer, expert).")
    for layer, expert in names:
        if layer not in layers or not 0 <= expert < layers[layer].num_experts:
            has = ", ".join(f"{index} (0 to {one.num_experts - 1})" for index, one in layers.items())
            raise LamellaError(
                f"The model has no expert {expert} of layer {layer}; its layers, with their experts: {has}."
            )
    return {(layer, expert): layers[layer].experts[expert] for layer, expert in names}


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
