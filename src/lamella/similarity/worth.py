"""What the numbers of an alignment are worth: controls, the seed ceiling, how well a screen ranks, a known truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lamella.errors import LamellaError
from lamella.similarity.align import beyond_controls, seed_ceiling

if TYPE_CHECKING:
    import pandas as pd

NAMES = ["source_layer", "source_expert", "target_layer", "target_expert"]
_SOURCE = NAMES[:2]
_MEASURES = ("floor", "cka_distance", "weight_distance")


def control_table(alignment: pd.DataFrame) -> pd.DataFrame:
    """The unexplained share of pairs beside that of every control, of one aligner.

    Columns ``control, rows, median, low, high``; nine tenths of the rows lie between ``low`` and ``high``.
    """
    import pandas as pd

    pairs = alignment[alignment["kind"] == "pair"]
    same = pairs["source_layer"] == pairs["target_layer"]
    shown = {
        "all pairs": pairs["nmse"],
        "pairs in one layer": pairs.loc[same, "nmse"],
        "pairs across layers": pairs.loc[~same, "nmse"],
        "itself": alignment.loc[alignment["kind"] == "self", "nmse"],
        "a random expert": alignment.loc[alignment["kind"] == "random-target", "nmse"],
        "no aligner": pairs["identity_nmse"],
        "the mean": pairs["mean_nmse"],
    }
    rows = [
        (name, len(values), values.median(), values.quantile(0.05), values.quantile(0.95))
        for name, values in shown.items()
        if len(values)
    ]
    return pd.DataFrame(rows, columns=["control", "rows", "median", "low", "high"])


def worth(alignment: pd.DataFrame, screened: pd.DataFrame | None = None) -> dict[str, float]:
    """Facts about an alignment of one aligner, by what they are.

    ``beyond``: share of pairs better than the mean, no aligner and a random expert. ``raw and variance``, ``share and
    variance``: rank correlation of the raw error and of the unexplained share with the replaced expert's variance.
    ``samples per parameter``: of an aligner, median. With two seeds or more, ``ceiling`` and ``ceiling within``: how
    one seed ranks pairs as the others do, over all and within an expert's stand-ins. With a screen, for each measure
    how it ranks an expert's stand-ins as the mean over seeds does, and ``below the floor``: rows whose error is below
    it.
    """
    pairs = alignment[alignment["kind"] == "pair"]
    found = {
        "beyond": float(beyond_controls(pairs)["beyond"].mean()),
        "raw and variance": _ranks(pairs, "mse", "source_variance"),
        "share and variance": _ranks(pairs, "nmse", "source_variance"),
        "samples per parameter": float(pairs["samples_per_parameter"].median()),
    }
    if pairs["seed"].nunique() > 1:
        ceiling = seed_ceiling(alignment)
        found |= {"ceiling": ceiling["overall"], "ceiling within": ceiling["within"]}
    if screened is not None:
        means = pairs.groupby(NAMES, as_index=False)[["nmse"]].mean().merge(screened, on=NAMES)
        for measure in _MEASURES:
            within = [
                _ranks(rows, measure, "nmse") for _, rows in means.groupby(_SOURCE) if rows[measure].nunique() > 1
            ]
            if within:
                found[measure] = float(np.nanmean(within))
        both = pairs.merge(screened, on=NAMES)
        found["below the floor"] = float((both["nmse"] < both["floor"] - 1e-6).sum())
    return found


def truth_auc(
    table: pd.DataFrame,
    kinds: Mapping[tuple[int, int], str],
    measure: str = "nmse",
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """How well a measure tells experts of one kind from others, where kinds are known.

    For each expert that is replaced: the chance that a stand-in of its own kind and layer is nearer than one of another
    kind (area under the curve; 0.5 is a guess), ties counting half. Then the mean over experts, with a
    95 % interval by drawing experts with replacement.

    Args:
        table: an alignment of one aligner, whose seeds are averaged, or a screen.
        kinds: of each (layer, expert).
        measure: its column, small where experts are alike.
        resamples: draws.
        seed: of the draws.

    Returns:
        ``auc``, ``low``, ``high``, ``experts``: how many counted.

    Raises:
        LamellaError: no expert has stand-ins of its own kind and of another.
    """
    pairs = table[table["kind"] == "pair"] if "kind" in table.columns else table
    pairs = pairs.dropna(subset=[measure]).groupby(NAMES, as_index=False)[measure].mean()
    pairs = pairs[pairs["source_layer"] == pairs["target_layer"]]
    areas = []
    for (layer, expert), rows in pairs.groupby(_SOURCE):
        alike = np.array([kinds[layer, target] == kinds[layer, expert] for target in rows["target_expert"]])
        own, other = rows[measure].to_numpy()[alike], rows[measure].to_numpy()[~alike]
        if len(own) and len(other):
            areas.append(float(((own[:, None] < other) + 0.5 * (own[:, None] == other)).mean()))
    if not areas:
        raise LamellaError("No expert was aligned with one of its own kind and one of another, in its layer.")
    draws = np.random.default_rng(seed).integers(len(areas), size=(resamples, len(areas)))
    low, high = np.quantile(np.array(areas)[draws].mean(1), [0.025, 0.975])
    return {"auc": float(np.mean(areas)), "low": float(low), "high": float(high), "experts": len(areas)}


def _ranks(rows: pd.DataFrame, one: str, other: str) -> float:
    return float(rows[one].rank().corr(rows[other].rank()))
