"""How far an alignment can be relied on: controls, the seed ceiling, how well a screen ranks, a known truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamella.errors import LamellaError
from lamella.similarity.alignment import beyond_controls, seed_ceiling
from lamella.similarity.alignment.controls import rank_agreement
from lamella.similarity.alignment.table import by_aligner
from lamella.similarity.pairs import NAMES
from lamella.statistics import mean_intervals

if TYPE_CHECKING:
    import pandas as pd

# Normalised error of an expert by itself from which its aligners count as untrained, and what helps.
NOT_REGAINED = 0.3
REMEDY = "Align with more --steps, or capture more with --per-expert, before drawing conclusions."
FloatArray = NDArray[np.float64]
_SOURCE = NAMES[:2]
_REVERSED = (("source", "target"), ("target", "source"))
_MEASURES = ("predicted", "floor", "cka_distance", "weight_distance")
KEPT = (1, 2, 4, 8)  # candidates of each expert


def control_table(alignment: pd.DataFrame) -> pd.DataFrame:
    """The normalised error of pairs beside that of every control, of one aligner.

    Columns ``control, rows, median, low, high``; nine tenths of the rows lie between ``low`` and ``high``. The row of
    both directions is of the size of nmse(s, t) - nmse(t, s): how far a pair says something else in reverse.
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
        "difference of both directions": _directions(pairs),
    }
    rows = [
        (name, len(values), values.median(), values.quantile(0.05), values.quantile(0.95))
        for name, values in shown.items()
        if len(values)
    ]
    return pd.DataFrame(rows, columns=["control", "rows", "median", "low", "high"])


def _directions(pairs: pd.DataFrame) -> pd.Series:
    """The size of nmse(s, t) - nmse(t, s) for each two experts and seed that have both."""
    ends = {f"{one}_{what}": f"{other}_{what}" for one, other in _REVERSED for what in ("layer", "expert")}
    there = pairs[[*NAMES, "seed", "nmse"]]
    both = there.merge(there.rename(columns=ends), on=[*NAMES, "seed"], suffixes=("", "_back"))
    first = (both["source_layer"] < both["target_layer"]) | (
        (both["source_layer"] == both["target_layer"]) & (both["source_expert"] < both["target_expert"])
    )  # each two once
    return (both["nmse"] - both["nmse_back"])[first].abs()


def reliability(alignment: pd.DataFrame, screened: pd.DataFrame | None = None) -> dict[str, float]:
    """Facts about an alignment of one aligner, by what they are.

    ``beyond``: share of pairs better than the mean, no aligner and a random expert. ``raw and variance``, ``share and
    variance``: rank correlation of the raw error and of the normalised error with the replaced expert's variance.
    ``samples per parameter``: of an aligner, median. With two seeds or more that differ, ``ceiling`` and ``ceiling
    within``: how one seed ranks pairs as the mean of the others does, over all and within an expert's replacements.
    With a screen, ``below the floor``: rows whose error is below it.
    """
    pairs = alignment[alignment["kind"] == "pair"]
    facts = {
        "beyond": float(beyond_controls(pairs)["beyond"].mean()),
        "raw and variance": _ranks(pairs, "mse", "source_variance"),
        "share and variance": _ranks(pairs, "nmse", "source_variance"),
        "samples per parameter": float(pairs["samples_per_parameter"].median()),
    }
    if pairs["seed"].nunique() > 1:
        ceiling = seed_ceiling(alignment)
        facts |= _known({"ceiling": ceiling["overall"], "ceiling within": ceiling["within"]})
    if screened is not None:
        both = pairs.merge(screened, on=NAMES)
        facts["below the floor"] = float((both["nmse"] < both["floor"] - 1e-6).sum())
    return facts


def screen_table(alignment: pd.DataFrame, screened: pd.DataFrame) -> pd.DataFrame:
    """How well what needs no training finds an expert's best replacements, of one aligner.

    A row for each measure that ranks anything, then ``another seed``, which none can be expected to better, and
    ``chance``. Columns ``measure``; ``within`` and ``all``: rank correlation with the error of trained aligners within
    an expert's replacements, mean over experts, and over all pairs; and for each k of `KEPT` ``lost, k kept``: by how
    much the best of the k replacements that the measure puts first errs more than the best of all, mean over experts.

    Errors are means over the seeds, less each seed in turn where there are several, so that all rows, that of another
    seed included, meet the same noise.
    """
    import pandas as pd

    pairs = alignment[alignment["kind"] == "pair"]
    seeds = pairs.pivot_table(index=NAMES, columns="seed", values="nmse").dropna()  # a row per pair
    several = len(seeds.columns) > 1
    errors = [seeds.drop(columns=[out] if several else []).mean(axis=1) for out in seeds.columns]
    measures = screened.set_index(NAMES)
    by: dict[str, list[pd.Series]] = {
        name: [measures[name]] * len(errors) for name in _MEASURES if name in measures and measures[name].nunique() > 1
    }
    if several:
        by["another seed"] = [seeds[out] for out in seeds.columns]
    rows = [
        [name, *np.mean([[*_agreement(*both), *_lost(*both)] for both in zip(measured, errors, strict=True)], axis=0)]
        for name, measured in by.items()
    ]
    chance = np.mean([_lost(None, error) for error in errors], axis=0)
    columns = ["measure", "within", "all", *(f"lost, {kept} kept" for kept in KEPT)]
    return pd.DataFrame([*rows, ["chance", math.nan, math.nan, *chance]], columns=columns)


def _agreement(measured: pd.Series, error: pd.Series) -> tuple[float, float]:
    overall, within = rank_agreement(measured, error)
    return within, overall


def _lost(measured: pd.Series | None, error: pd.Series) -> list[float]:
    """What the best of the first k replacements by a measure, or of any k, errs more than the best, for k in `KEPT`."""
    if measured is not None:
        promising = measured.reindex(error.index).dropna().sort_values(kind="stable").index
        error = error.loc[promising]
    best = _best_of_any if measured is None else _best_of_first
    of_sources = [errors.to_numpy() for _, errors in error.groupby(level=_SOURCE)]
    lost = [[best(errors, kept) - float(errors.min()) for kept in KEPT] for errors in of_sources]
    return np.mean(lost, axis=0).tolist() if lost else [math.nan] * len(KEPT)


def _best_of_first(errors: FloatArray, kept: int) -> float:
    return float(errors[:kept].min())


def _best_of_any(errors: FloatArray, kept: int) -> float:
    """The expected smallest of so many of the errors, drawn without replacement."""
    n, kept = len(errors), min(kept, len(errors))
    chances = [math.comb(n - 1 - rank, kept - 1) / math.comb(n, kept) for rank in range(n)]  # that it is of this rank
    return float(np.sort(errors) @ chances)


def alignment_facts(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What an alignment says at a glance, for each of its aligners by name."""
    facts = {}
    for name, rows in by_aligner(table).items():
        pairs = rows[rows["kind"] == "pair"]
        if len(pairs):
            medians = rows.groupby("kind")["nmse"].median()
            facts[name] = {
                "median nmse": float(medians["pair"]),
                "self": float(medians.get("self", math.nan)),
                "random target": float(medians.get("random-target", math.nan)),
                "beyond controls": float(beyond_controls(pairs)["beyond"].mean()),
                "seed ceiling": seed_ceiling(rows) if rows["seed"].nunique() > 1 else None,
            }
    return dict(sorted(facts.items()))


def alignment_in_words(name: str, facts: Mapping[str, Any]) -> list[str]:
    """The facts of one aligner in sentences; first, where that is so, that it did not learn."""
    ceiling = facts["seed ceiling"]
    ranked = (
        ""
        if ceiling is None or math.isnan(ceiling["overall"])
        else f" One seed ranks pairs as another does with {ceiling['overall']:.2f}."
    )
    failed = [f"{name}: the aligners hardly learned: not even the expert itself is regained. {REMEDY}"]
    return [
        *(failed if facts["self"] > NOT_REGAINED else []),
        f"{name}: {facts['median nmse']:.1%} of the variance stays unexplained at the median; itself "
        f"{facts['self']:.2%}, a random expert {facts['random target']:.1%}; {facts['beyond controls']:.0%} of the "
        f"pairs are better than all controls.{ranked}",
    ]


def truth_auc(
    table: pd.DataFrame,
    kinds: Mapping[tuple[int, int], str],
    measure: str = "nmse",
) -> dict[str, float]:
    """How well a measure tells experts of one kind from others, where kinds are known.

    For each expert that is replaced: the chance that one of its own kind and layer is nearer than one of another kind
    (area under the curve; 0.5 is a guess), ties counting half. Then the mean over experts, with a 95 % interval by
    drawing experts with replacement; NaN for a single expert.

    Args:
        table: an alignment of one aligner, whose seeds are averaged, or a screen.
        kinds: of each (layer, expert).
        measure: its column, small where experts are alike.

    Returns:
        ``auc``, ``low``, ``high``, ``experts``: how many counted.

    Raises:
        LamellaError: no expert has replacements of its own kind and of another.
    """
    pairs = table[table["kind"] == "pair"] if "kind" in table.columns else table
    pairs = pairs.dropna(subset=[measure]).groupby(NAMES, as_index=False)[measure].mean()
    pairs = pairs[pairs["source_layer"] == pairs["target_layer"]]
    areas = []
    for (layer, expert), rows in pairs.groupby(_SOURCE):
        alike = np.array([kinds[layer, target] == kinds[layer, expert] for target in rows["target_expert"]])
        same, other = rows[measure].to_numpy()[alike], rows[measure].to_numpy()[~alike]
        if len(same) and len(other):
            areas.append(float(((same[:, None] < other) + 0.5 * (same[:, None] == other)).mean()))
    if not areas:
        raise LamellaError("No expert was aligned with one of its own kind and one of another, in its layer.")
    low, high = mean_intervals({measure: {0: areas}}).get(measure, (math.nan, math.nan))
    return {"auc": float(np.mean(areas)), "low": low, "high": high, "experts": len(areas)}


def _known(facts: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if not math.isnan(value)}


def _ranks(rows: pd.DataFrame, one: str, other: str) -> float:
    return float(rows[one].rank().corr(rows[other].rank()))
