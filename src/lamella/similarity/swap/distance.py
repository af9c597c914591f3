"""Whether a swap costs more the farther apart the two layers are."""

from collections.abc import Callable
from itertools import permutations
from math import factorial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
_CHUNK_ENTRIES = 2_000_000
_EXACT = 5040  # permutations of labels up to which all are tried


def distance_regression(
    frame: "pd.DataFrame", *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, float | int]:
    """The effect of a swap against the distance in depth of its layers, and against their mean depth.

    Swaps that share a layer are not independent, so layers are resampled, not swaps: a draw takes the layers with
    replacement, and the swap of layers i and j counts as often as i times as often as j was drawn (a swap within one
    layer as often as the layer). P-values come from giving the layers of a stack each other's depth (Mantel's test):
    the share of permutations whose rank correlation is as large in size, all of them where they are few, so that with
    few layers it cannot be small. Self swaps and random weights are left out.

    Args:
        frame: rows of ``swap_effects``, of one unit, metric, direction and kind.
        level: coverage of the percentile intervals.
        resamples: bootstrap draws and, where all are too many, permutations. Draws in which all swaps have one distance
            or one depth do not count.
        seed: of both.

    Returns:
        ``slope``, ``low``, ``high``: effect per block of distance, least squares with an intercept. ``intercept``.
        ``spearman``, ``p_value``: rank correlation with the distance. ``depth_slope``, ``depth_low``, ``depth_high``,
        ``depth_spearman``, ``depth_p_value``: the same for the mean depth of the two layers. ``adjusted_slope``,
        ``adjusted_low``, ``adjusted_high``: of distance with mean depth held. NaN where depth and distance cannot be
        told apart. ``swaps``, ``layers``, ``draws`` (that counted), ``level``.

    Raises:
        LamellaError: mixed rows, or too few layers to have two distances.

    Source: Snijders & Borgatti, Non-parametric standard errors and tests for network statistics, 1999; Mantel, The
    detection of disease clustering and a generalized regression approach, 1967.
    """
    rows = _swaps(frame)
    layers, ends = np.unique(rows[["first_layer", "second_layer"]].to_numpy(np.int64), return_inverse=True)
    ends = ends.reshape(-1, 2)  # (swaps, 2), indices into layers
    effect, depth = rows["effect"].to_numpy(np.float64), layers.astype(np.float64)
    generator = np.random.default_rng(seed)
    labels = _relabelled(depth, ends, resamples, generator)
    # all swaps of two layers have one distance and one depth, so that their mean and number are enough for a slope
    pairs, at = np.unique(ends, axis=0, return_inverse=True)
    number = np.bincount(at.ravel()).astype(np.float64)
    y = np.bincount(at.ravel(), effect) / number
    counts = _counts(pairs, len(layers), resamples, generator) * number
    distance, middle = _distance(depth, pairs), _middle(depth, pairs)
    found: dict[str, float | int] = {}
    for prefix, x, measure in (("", distance, _distance), ("depth_", middle, _middle)):
        found[f"{prefix}slope"] = float(_slopes(x, y, number[None])[0])
        found[f"{prefix}low"], found[f"{prefix}high"] = _percentiles(_slopes(x, y, counts), level)
        found[f"{prefix}spearman"], found[f"{prefix}p_value"] = _mantel(effect, depth, labels, ends, measure)
    found["adjusted_slope"] = float(_adjusted_slopes(distance, middle, y, number[None])[0])
    adjusted = _adjusted_slopes(distance, middle, y, counts)
    found["adjusted_low"], found["adjusted_high"] = _percentiles(adjusted, level)
    found["intercept"] = float(effect.mean() - found["slope"] * _distance(depth, ends).mean())
    draws = int(np.isfinite(_slopes(distance, y, counts)).sum())
    return found | {"swaps": len(effect), "layers": len(layers), "draws": draws, "level": level}


def _swaps(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of swaps of two different parts."""
    is_self = (frame["first_layer"] == frame["second_layer"]) & (frame["first_expert"] == frame["second_expert"])
    rows = frame[~is_self & (frame["second_layer"] >= 0)]
    for name in ("unit", "metric", "exchange", "aligned"):
        if rows[name].nunique() > 1:
            raise LamellaError(
                f"The swaps differ in {name} ({', '.join(map(str, rows[name].unique()))}), and one line through them "
                f"all means nothing; choose the rows of one {name}."
            )
    if rows["distance"].nunique() < 2:
        raise LamellaError(
            f"The {len(rows)} swaps have {rows['distance'].nunique()} distances between layers, and a slope needs at "
            "least two; swap the pairs of three or more layers."
        )
    return rows


def _counts(pairs: Indices, layers: int, draws: int, generator: np.random.Generator) -> Array:
    """How often each pair of layers is there, ``(draws, pairs)``, when the layers are drawn with replacement."""
    drawn = generator.multinomial(layers, np.full(layers, 1.0 / layers), size=draws)
    first, second = drawn[:, pairs[:, 0]], drawn[:, pairs[:, 1]]
    return np.where(pairs[:, 0] == pairs[:, 1], first, first * second).astype(np.float64)


def _distance(depth: Array, ends: Indices) -> Array:
    return np.abs(depth[..., ends[:, 0]] - depth[..., ends[:, 1]])


def _middle(depth: Array, ends: Indices) -> Array:
    return (depth[..., ends[:, 0]] + depth[..., ends[:, 1]]) / 2


def _slopes(x: Array, y: Array, counts: Array) -> Array:
    """Slope of y on x, ``(swaps,)``, for each row of counts ``(draws, swaps)``; NaN where x does not vary."""
    sxx, sxy = _moment(x, x, counts), _moment(x, y, counts)
    return _divided(sxy, sxx, sxx)


def _adjusted_slopes(x: Array, z: Array, y: Array, counts: Array) -> Array:
    """Slope of y on x with z held, for each row of counts; NaN where x and z cannot be told apart."""
    sxx, szz, sxz = _moment(x, x, counts), _moment(z, z, counts), _moment(x, z, counts)
    sxy, szy = _moment(x, y, counts), _moment(z, y, counts)
    return _divided(sxy * szz - szy * sxz, sxx * szz - sxz**2, sxx * szz)


def _divided(above: Array, below: Array, scale: Array) -> Array:
    enough = below > 1e-9 * np.maximum(scale, 1e-9)
    return np.where(enough, above / np.where(enough, below, 1.0), np.nan)


def _moment(a: Array, b: Array, counts: Array) -> Array:
    """Covariance for each row of counts, ``(draws,)``."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return share @ (a * b) - (share @ a) * (share @ b)


def _percentiles(slopes: Array, level: float) -> tuple[float, float]:
    counted = slopes[np.isfinite(slopes)]
    if len(counted) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(counted, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _relabelled(depth: Array, ends: Indices, most: int, generator: np.random.Generator) -> Array:
    """Depths given to other layers of the same stack, ``(permutations, layers)``: all ways, or ``most`` by chance."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = len(depth)
    _, stack = connected_components(coo_array((np.ones(len(ends)), ends.T), shape=(size, size)), directed=False)
    members = [np.flatnonzero(stack == one) for one in np.unique(stack)]
    if len(members) == 1 and factorial(size) <= _EXACT:
        return depth[np.asarray(list(permutations(range(size))))]
    labels = np.tile(depth, (most + 1, 1))  # the first stays as it is: what was found counts among the permutations
    for inside in members:
        labels[1:, inside] = generator.permuted(labels[1:, inside], axis=1)
    return labels


def _mantel(
    effect: Array, depth: Array, labels: Array, ends: Indices, measure: Callable[[Array, Indices], Array]
) -> tuple[float, float]:
    """Spearman's correlation of effect and measure, and how often relabelled depths reach its size."""
    from scipy.stats import rankdata

    ranks = _standard(rankdata(effect))
    parts = np.array_split(labels, 1 + labels.shape[0] * len(effect) // _CHUNK_ENTRIES)
    others = [_standard(rankdata(measure(part, ends), axis=1)) @ ranks for part in parts]
    found = float(_standard(rankdata(measure(depth, ends))) @ ranks)
    return found, float((np.abs(np.concatenate(others)) >= abs(found) - 1e-12).mean())


def _standard(ranks: Array) -> Array:
    """Centred and of length 1 along the last axis; all zero where it does not vary."""
    centred = ranks - ranks.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return centred / np.where(length > 0, length, 1.0)
