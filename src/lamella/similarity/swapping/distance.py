"""Whether a swap costs more the farther apart the two layers are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from math import factorial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError
from lamella.similarity.swapping.effects import kinds

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Measure = Callable[[Array, Indices], Array]  # of depths (..., layers) and pairs, to (..., pairs)
_CHUNK_ENTRIES = 2_000_000
_EXACT = 5040  # permutations of labels up to which all are tried


def distance_regression(
    frame: "pd.DataFrame", *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, float | int]:
    """The effect of a swap against the distance in depth of its layers, and against their mean depth.

    Swaps that share a layer are not independent, so layers are given each other's depth (Mantel's test), not swaps: a
    p-value is the share of these permutations whose rank correlation is as large in size. An interval holds the slopes
    b for which the same test, of the correlation with effect - b x, has a p-value above 1 - level. With few layers no
    p-value can be small; then there is no interval. Self swaps and random weights are left out.

    Args:
        frame: rows of ``swap_effects``, of one unit, metric, direction and kind.
        level: coverage of the intervals.
        resamples: permutations, where all are too many.
        seed: of the permutations.

    Returns:
        ``slope``, ``low``, ``high``: effect per block of distance, least squares with an intercept. ``intercept``.
        ``spearman``, ``p_value``: rank correlation with the distance. ``least_p``: the smallest that this p-value can
        be with these layers. ``depth_slope``, ``depth_low``, ``depth_high``, ``depth_spearman``, ``depth_p_value``: the
        same for the mean depth of the two layers. ``adjusted_slope``, ``adjusted_low``, ``adjusted_high``: of distance
        with mean depth held, which stays where it is when layers are relabelled, so that this interval is approximate.
        Slopes are NaN where depth and distance cannot be distinguished, intervals also where the layers are too few.
        ``swaps``, ``layers``, ``permutations``, ``level``.

    Raises:
        LamellaError: mixed rows, or too few layers to have two distances.

    Source: Mantel, The detection of disease clustering and a generalized regression approach, 1967; Lehmann & Romano,
    Testing Statistical Hypotheses, 2005, §5.4 and §15.2 (intervals by inverting tests, permutation tests).
    """
    rows = _swaps(frame)
    layers, ends = np.unique(rows[["first_layer", "second_layer"]].to_numpy(np.int64), return_inverse=True)
    ends = ends.reshape(-1, 2)  # (swaps, 2), indices into layers
    effect, depth = rows["effect"].to_numpy(np.float64), layers.astype(np.float64)
    labels = _relabelled(depth, ends, resamples, np.random.default_rng(seed))
    # all swaps of two layers have one distance and one depth, so that their mean and number are enough for a slope
    pairs, at = np.unique(ends, axis=0, return_inverse=True)
    number = np.bincount(at.ravel()).astype(np.float64)
    means = _Means(pairs, np.bincount(at.ravel(), effect) / number, number, depth, labels)
    line: dict[str, float | int] = {}
    for prefix, measure in (("", _distance), ("depth_", _middle)):
        line |= _named(prefix, means.line(measure, None, level))
        line[f"{prefix}spearman"], line[f"{prefix}p_value"] = _mantel(effect, depth, labels, ends, measure)
    line["least_p"] = _mantel(_distance(depth, ends), depth, labels, ends, _distance)[1]
    line |= _named("adjusted_", means.line(_distance, _middle, level))
    line["intercept"] = float(effect.mean() - line["slope"] * _distance(depth, ends).mean())
    return line | {"swaps": len(effect), "layers": len(layers), "permutations": len(labels), "level": level}


def distance_regressions(frame: "pd.DataFrame") -> dict[str, dict[str, float | int]]:
    """The regression of each kind of swaps, by its name; none of what has fewer than two distances between layers."""
    return {
        name: distance_regression(rows)
        for name, rows in kinds(frame).items()
        if rows.loc[rows["distance"] > 0, "distance"].nunique() > 1
    }


def change_in_words(regression: Mapping[str, float]) -> str:
    """What a regression says of the effect over the distance, as a verb: by its p-value, not by its interval."""
    if regression["least_p"] > 1 - regression["level"]:
        return f"cannot be told with {regression['layers']:.0f} layers to grow or to shrink"
    if regression["p_value"] > 1 - regression["level"]:
        return "does not change beyond chance"
    return "grows" if regression["spearman"] > 0 else "shrinks"


def regression_in_words(name: str, regression: Mapping[str, float]) -> str:
    """What a regression says of swaps of this name, in a sentence."""
    interval = "" if np.isnan(regression["low"]) else f" [{regression['low']:+.4f}, {regression['high']:+.4f}]"
    return (
        f"The effect of {name} {change_in_words(regression)} with the distance of the layers: "
        f"{regression['slope']:+.4f} per layer{interval}, rank correlation {regression['spearman']:.2f} "
        f"(p {regression['p_value']:.3f})."
    )


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


def _distance(depth: Array, ends: Indices) -> Array:
    return np.abs(depth[..., ends[:, 0]] - depth[..., ends[:, 1]])


def _middle(depth: Array, ends: Indices) -> Array:
    return (depth[..., ends[:, 0]] + depth[..., ends[:, 1]]) / 2


@dataclass(frozen=True, eq=False)
class _Means:
    """The mean effect of each pair of layers, and other depths that the layers could have.

    Attributes:
        pairs: indices into the layers, ``(pairs, 2)``.
        effect: ``(pairs,)``.
        number: of swaps that it is the mean of, ``(pairs,)``.
        depth: of the layers, ``(layers,)``.
        labels: ``(permutations, layers)``.
    """

    pairs: Indices
    effect: Array
    number: Array
    depth: Array
    labels: Array

    def line(self, measure: Measure, held: Measure | None, level: float) -> tuple[float, float, float]:
        """Slope of the effect on a measure of pairs, with another held, and the ends of its interval; NaN for none."""
        constant = [np.ones(len(self.pairs))] + ([] if held is None else [held(self.depth, self.pairs)])
        basis = np.linalg.qr(np.stack(constant, 1) * np.sqrt(self.number)[:, None])[0]  # (pairs, 1 or 2)

        def rest(values: Array) -> Array:
            """What the constant and the held measure leave of values ``(..., pairs)``."""
            weighted = values * np.sqrt(self.number)
            left: Array = weighted - (weighted @ basis) @ basis.T
            return np.where(np.abs(left) > 1e-9 * np.abs(weighted).max(), left, 0.0)

        x, y = rest(measure(self.depth, self.pairs)), rest(self.effect)
        if not x.any():
            return float("nan"), float("nan"), float("nan")
        slope = float(x @ y / (x @ x))
        parts = np.array_split(self.labels, 1 + self.labels.shape[0] * len(x) // _CHUNK_ENTRIES)
        relabelled = [_bounds(rest(measure(part, self.pairs)), x, y - slope * x) for part in parts]
        lows, highs = np.sort(np.concatenate(relabelled, axis=1), axis=1)
        most = int((1 - level) * len(lows))  # of the permutations may lie within a slope that is left out
        low, high = lows[most], highs[-1 - most]
        finite = bool(np.isfinite(low) and np.isfinite(high))
        return (slope, slope + float(low), slope + float(high)) if finite else (slope, float("nan"), float("nan"))


def _bounds(others: Array, x: Array, left: Array) -> Array:
    """Between which changes u of the slope each relabelled measure explains effect - (slope + u) x as well as x does.

    With r the correlation of measure and x, and e the part of ``left`` along the measure over the length of x, that is
    |u| <= |e - u r|: between e / (1 + r) and -e / (1 - r), and everywhere where the measure is x or its reverse.

    Args:
        others: ``(permutations, pairs)``, centred as x.
        x: ``(pairs,)``.
        left: what the line through x leaves of the effect, ``(pairs,)``.

    Returns:
        Lower and upper ends, ``(2, permutations)``, around 0.
    """
    length, lengths = np.linalg.norm(x), np.linalg.norm(others, axis=1, keepdims=True)
    unit = others / np.where(lengths > 0, lengths, 1.0)
    r, e = unit @ x / length, unit @ left / length
    same = np.abs(r) > 1 - 1e-9
    r[same] = 0.0
    ends = np.sort(np.stack([e / (1 + r), -e / (1 - r)]), axis=0)
    ends[:, same] = [[-np.inf], [np.inf]]
    return ends


def _named(prefix: str, line: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((f"{prefix}slope", f"{prefix}low", f"{prefix}high"), line, strict=True))


def _relabelled(depth: Array, ends: Indices, most: int, generator: np.random.Generator) -> Array:
    """Depths given to other layers of the same stack, ``(permutations, layers)``: all ways, or ``most`` by chance."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = len(depth)
    _, stack = connected_components(coo_array((np.ones(len(ends)), ends.T), shape=(size, size)), directed=False)
    members = [np.flatnonzero(stack == one) for one in np.unique(stack)]
    if len(members) == 1 and factorial(size) <= _EXACT:
        return depth[np.asarray(list(permutations(range(size))))]
    labels = np.tile(depth, (most + 1, 1))  # the first stays as it is: the observed one counts among the permutations
    for inside in members:
        labels[1:, inside] = generator.permuted(labels[1:, inside], axis=1)
    return labels


def _mantel(effect: Array, depth: Array, labels: Array, ends: Indices, measure: Measure) -> tuple[float, float]:
    """Spearman's correlation of effect and measure, and how often relabelled depths reach its size."""
    from scipy.stats import rankdata

    ranks = _standard(rankdata(effect))
    parts = np.array_split(labels, 1 + labels.shape[0] * len(effect) // _CHUNK_ENTRIES)
    others = [_standard(rankdata(measure(part, ends), axis=1)) @ ranks for part in parts]
    observed = float(_standard(rankdata(measure(depth, ends))) @ ranks)
    return observed, float((np.abs(np.concatenate(others)) >= abs(observed) - 1e-12).mean())


def _standard(ranks: Array) -> Array:
    """Centred and of length 1 along the last axis; all zero where it does not vary."""
    centred = ranks - ranks.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return centred / np.where(length > 0, length, 1.0)
