"""The results of a study of expert similarity, in a few sentences with their numbers."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lamella.lab.report.similarity.matrices import pair_means
from lamella.similarity.compression import verdict
from lamella.similarity.reliability import NOT_REGAINED, REMEDY
from lamella.similarity.swapping import regression_in_words


def summary(
    alignment: pd.DataFrame | None,
    distance: Mapping[str, Mapping[str, float]] | None,
    swap: pd.DataFrame | None,
    compression: pd.DataFrame | None,
) -> list[str]:
    """A sentence or two for each step that was run, first what can go at which cost."""
    sentences = []
    if compression is not None and len(compression):
        sentences += verdict(compression) if "gone" in compression.columns else [_of_compression(compression)]
    if alignment is not None and len(alignment):
        sentences += _of_alignment(alignment)
    if swap is not None and len(swap):
        sentences.append(_of_swaps(swap, distance))
    return sentences or ["Nothing was measured yet."]


def _of_alignment(alignment: pd.DataFrame) -> list[str]:
    aligned = {aligner: pairs for aligner, pairs in pair_means(alignment).items() if (pairs["kind"] == "pair").any()}
    if not aligned:
        return ["No pair of two different experts was aligned."]
    sentences = [sentence for aligner, pairs in aligned.items() for sentence in _of_aligner(aligner, pairs)]
    return [*sentences, _of_variance(alignment)]


def _of_aligner(aligner: str, rows: pd.DataFrame) -> list[str]:
    pairs, itself = rows[rows["kind"] == "pair"], rows.loc[rows["kind"] == "self", "nmse"].median()
    sources = pairs.groupby(["source_layer", "source_expert"]).ngroups
    counting = pairs[pairs["beyond"]]
    best = counting.loc[counting.groupby(["source_layer", "source_expert"])["nmse"].idxmin()]
    names = {*zip(pairs["source_layer"], pairs["source_expert"], strict=True)}
    names |= {*zip(pairs["target_layer"], pairs["target_expert"], strict=True)}
    aligned = f"{len(pairs):,} of {len(names) * (len(names) - 1):,} pairs were aligned ({aligner})"
    control = "" if np.isnan(itself) else f"; the expert itself, the control, leaves {itself:.0%}"
    if best.empty:
        words = (
            f"{aligned}; none of them is better than the mean, no aligner and a random expert with every seed, so none "
            f"is a replacement{control}."
        )
    else:
        top = best.loc[best["nmse"].idxmin()]
        within = (best["source_layer"] == best["target_layer"]).mean()
        words = (
            f"{aligned}; {len(counting):,} of them are better than the mean, no aligner and a random expert with every "
            f"seed. So {len(best)} of {sources} experts have a replacement; the best leaves a median "
            f"{best['nmse'].median():.0%} of the output variance unexplained on held-out tokens{control}. The closest "
            f"pair is {_name(top)} ({top['nmse']:.0%}). {within:.0%} of the best lie in the same layer."
        )
    failed = f"The aligners ({aligner}) hardly learned: not even the expert itself is regained. {REMEDY}"
    return [failed, words] if itself > NOT_REGAINED else [words]


def _of_variance(alignment: pd.DataFrame) -> str:
    rows = alignment[alignment["kind"] == "pair"]
    raw = rows["mse"].rank().corr(rows["source_variance"].rank())
    normalised = rows["nmse"].rank().corr(rows["source_variance"].rank())
    if np.isnan(raw):  # of one pair, or of experts that vary alike
        return "Matrices show the normalised error."
    known = "" if np.isnan(normalised) else f"; the normalised error by {normalised:.2f}"
    return (
        f"Raw error follows the variance of the expert that is replaced (rank correlation {raw:.2f}{known}), so "
        "matrices show the normalised error."
    )


def _of_swaps(swap: pd.DataFrame, distance: Mapping[str, Mapping[str, float]] | None) -> str:
    real = swap[swap["distance"] > 0]
    if real.empty:
        return f"{len(swap)} swaps were tried, none between two layers."
    worst = real.loc[real["effect"].abs().idxmax()]
    sentences = [
        f"{len(real)} swaps between layers were tried; the largest effect is {worst['metric']} {worst['effect']:+.3f} "
        f"[{worst['low']:+.3f}, {worst['high']:+.3f}] ({worst['unit']} of layers {worst['first_layer']} and "
        f"{worst['second_layer']})."
    ]
    sentences += [regression_in_words(name, regression) for name, regression in (distance or {}).items()]
    return " ".join(sentences)


def _of_compression(compression: pd.DataFrame) -> str:
    """Of a table of the first edition, which does not say which experts went."""
    rows = compression[compression["budget"] < 1]
    if rows.empty:
        return "Nothing was compressed."
    budget = rows["budget"].max()
    domains = {}
    for domain, here in rows[rows["budget"] == budget].groupby("domain", sort=False):
        means = here.groupby("method")["ratio"].mean().sort_values()
        domains[domain] = ", ".join(f"{method} {ratio:.3f}" for method, ratio in means.items())
    listed = "; ".join(words if len(domains) == 1 else f"on {domain} {words}" for domain, words in domains.items())
    return f"Keeping {budget:.0%} of the experts' parameters multiplies perplexity by: {listed}."


def _name(pair: pd.Series) -> str:
    return (
        f"expert {int(pair['source_expert'])} of layer {int(pair['source_layer'])} by expert "
        f"{int(pair['target_expert'])} of layer {int(pair['target_layer'])}"
    )
