"""How far experts are from each other, read from the tables of a study or made for a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lamella.backbones.moe import MoELayer
from lamella.errors import LamellaError
from lamella.similarity.compression.grouping import Distances
from lamella.similarity.screening.pairs import NAMES, Name
from lamella.similarity.screening.weights import weight_distance

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture

_SCREENED = "cka_distance"
_SIDES = ("source", "target")


def choose_measure(table: pd.DataFrame, measure: str | None, aligned: bool) -> str:
    """The column to go by: of an alignment the error with aligner or with none, of a screen the CKA distance.

    Raises:
        LamellaError: the table is no table of ordered pairs, or lacks the column.
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
    means = pairs.groupby(list(NAMES), as_index=False)[measure].mean()
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
        layer, expert, to_layer, to_expert = nan[list(NAMES)].iloc[0]
        raise LamellaError(
            f"The {measure} of expert {expert} of layer {layer} by expert {to_expert} of layer {to_layer} is NaN, and "
            f"{len(nan) - 1} more rows are; leave such rows out of the table, or measure them with more samples."
        )


def weigh(distances: Distances, shares: Sequence[float]) -> Distances:
    """What it costs to let a target stand in for a source: the distance, by how many tokens the source gets.

    A source that gets none costs nothing, measured or not: without tokens nothing can be measured.
    """
    share = np.asarray(shares)[:, None]  # (n, 1)
    weighed = np.multiply(distances, share, where=np.isfinite(distances), out=np.full_like(distances, np.inf))
    return np.where(share == 0, 0.0, weighed)


def is_used(expert: Name, shares: Mapping[Name, float] | None) -> bool:
    """Whether any token went to the expert, as far as anybody counted."""
    return shares is None or shares[expert] > 0


def cheaper_way(distances: Distances) -> Distances:
    """For each two experts the better direction: one of them will stand in for the other."""
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


def usage(capture: Capture, keys: Sequence[Name]) -> dict[Name, float]:
    """How many tokens the capture's text gave to each expert, over those of its layer.

    Raises:
        LamellaError: the capture counted other experts.
    """
    routing = capture.routing
    counted = {
        (int(layer), int(expert)): float(share)
        for layer, expert, share in zip(routing["layer"], routing["expert"], routing["share"], strict=True)
    }
    if missing := [key for key in keys if key not in counted]:
        layer, expert = missing[0]
        raise LamellaError(
            f"The capture counted nothing for expert {expert} of layer {layer}; capture this model anew."
        )
    return {key: counted[key] for key in keys}
