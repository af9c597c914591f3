"""What kept studies of expert similarity say, as a page of docs/evidence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.similarity import largest_compression
from lamella.similarity.alignment.table import by_aligner
from lamella.similarity.reliability import control_table, reliability, screen_table, truth_auc
from lamella.similarity.study import StudyFolder
from lamella.similarity.swapping import change_in_words, distance_regressions, kinds, layer_tables
from studies.tables import markdown

if TYPE_CHECKING:
    import pandas as pd

ROWS = Path(__file__).parent / "similarity_rows"
_TABLES = ("screen", "alignment", "swap", "compression", "rerouting")
_FACTS = ("study", "alignment", "ground_truth")
_WITHIN = 0.01  # rise of perplexity up to which merging counts as free


@dataclass(frozen=True)
class KeptSimilarity:
    """What is kept of one study: its name and folder."""

    name: str
    folder: StudyFolder


def is_similarity(folder: Path) -> bool:
    """Whether a folder holds a study of expert similarity."""
    return (folder / "study.json").is_file()


def keep_similarity(folder: Path, into: Path = ROWS) -> str:
    """Copies the tables of a study into the folder of kept ones; gives its name.

    Raises:
        LamellaError: nothing was aligned or swapped yet.
    """
    tables = [f"{name}.parquet" for name in _TABLES if (folder / f"{name}.parquet").is_file()]
    if not {"alignment.parquet", "swap.parquet"} & set(tables):
        raise LamellaError(f"{folder} has no alignment and no swaps yet, so there is nothing to keep.")
    facts = [f"{name}.json" for name in _FACTS if (folder / f"{name}.json").is_file()]
    with atomic(into / folder.name) as unfinished:
        unfinished.mkdir()
        for name in [*tables, *facts]:
            shutil.copyfile(folder / name, unfinished / name)
    return folder.name


def kept_similarity(folder: Path = ROWS) -> list[KeptSimilarity]:
    """The kept studies by name; none where the folder is not there."""
    return [KeptSimilarity(path.name, StudyFolder(path)) for path in sorted(folder.glob("*")) if is_similarity(path)]


def medians(study: KeptSimilarity) -> dict[str, float]:
    """The median normalised error of all pairs and of each control, behind the first aligner of the study."""
    rows = next(iter(by_aligner(study.folder.table("alignment")).values()))
    return {str(row["control"]): float(row["median"]) for row in control_table(rows).to_dict("records")}


def similarity_page(kept: Sequence[KeptSimilarity]) -> str:
    """Docs/evidence/expert-similarity.md, as Markdown; empty where nothing is kept."""
    if not kept:
        return ""
    questions: list[tuple[str, Callable[[KeptSimilarity], str | None]]] = [
        ("How good is a replacement behind an aligner, beside its controls?", _controls),
        ("Does raw error say more than the variance of what is replaced?", _variance),
        ("How far can a ranking be trusted, and does a screen without training reach it?", _ranking),
        ("Are experts of one kind recognised, where the truth is known?", _truth),
        ("Does the damage of a swap grow with the distance of the layers?", _distance),
        (f"How much can be merged before perplexity rises by {_WITHIN:.0%}?", _merging),
        ("Where should tokens go whose expert is gone?", _rerouting),
    ]
    parts = ["# Expert similarity", _INTRODUCTION]
    for question, answer in questions:
        answers = [(one, words) for one in kept if (words := answer(one)) is not None]
        if answers:
            parts += [f"## {question}", *(f"**{one.name}.** {words}" for one, words in answers)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
Rows are in `studies/similarity_rows`, a folder per study; `lamella similarity` makes
them, `python -m studies --add FOLDER` keeps them. The normalised error is the mean squared error of target(A(x)) on
held-out documents over the variance of what the source puts out there: 0 is the same function, 1 is the mean."""


def _controls(study: KeptSimilarity) -> str | None:
    return _per_aligner(study, lambda rows: "\n\n" + markdown(
        ["", "rows", "median", "5 % to 95 %"],
        [
            [row["control"], f"{row['rows']:,}", f"{row['median']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
            for row in control_table(rows).to_dict("records")
        ],
    ))  # fmt: skip


def _variance(study: KeptSimilarity) -> str | None:
    def words(rows: pd.DataFrame) -> str:
        pairs = rows[rows["kind"] == "pair"]
        sources = pairs.groupby(["source_layer", "source_expert"])[["mse", "nmse", "source_variance"]].median()
        worst = sources["mse"].idxmax()
        measured = reliability(rows)
        rank = int(sources["nmse"].rank(ascending=False).loc[worst])
        return (
            f"Rank correlation of the raw error with the source's variance {measured['raw and variance']:.3f}, of the "
            f"normalised error {measured['share and variance']:.3f}. The outlier by raw error, expert {worst[1]} of "
            f"layer {worst[0]}, has {sources['mse'].max() / sources['mse'].median():.1f} times the median error and "
            f"{sources.loc[worst, 'source_variance'] / sources['source_variance'].median():.1f} times the median "
            f"variance; by normalised error it is number {rank} of {len(sources)}."
        )

    return _per_aligner(study, words)


def _ranking(study: KeptSimilarity) -> str | None:
    screened = study.folder.table("screen")

    def words(rows: pd.DataFrame) -> str:
        measured = reliability(rows, screened)
        if "ceiling" not in measured:
            return "No ceiling: there is one seed, or nothing that a seed changes."
        table = None if screened is None else screen_table(rows, screened)
        measures = [] if table is None else [
            (name, within) for name, within in zip(table["measure"], table["within"], strict=True)
            if name not in ("another seed", "chance")
        ]  # fmt: skip
        ranked = ", ".join(
            f"{name.replace('_', ' ')} {value:.2f} ({value / measured['ceiling within']:.2f} of the ceiling)"
            for name, value in measures
        )
        return (
            f"One seed ranks all pairs as the others do with {measured['ceiling']:.2f}, an expert's replacements with "
            f"{measured['ceiling within']:.2f}: the ceiling. An expert's replacements are ranked by "
            f"{ranked or 'nothing that was screened'}. Rows below the floor: {measured.get('below the floor', 0):.0f}."
        )

    return _per_aligner(study, words)


def _truth(study: KeptSimilarity) -> str | None:
    truth = study.folder.facts("ground_truth")
    if truth is None:
        return None
    kinds = {(layer, one["expert"]): one["kind"] for layer in truth["layers"] for one in truth["experts"]}

    measured: list[tuple[str, pd.DataFrame, str]] = []
    alignment, screened = study.folder.table("alignment"), study.folder.table("screen")
    if alignment is not None:
        for name, rows in by_aligner(alignment).items():
            measured.append((f"behind the aligner {name}", rows, "nmse"))
        measured.append(("without aligner", alignment, "identity_nmse"))
    if screened is not None:
        names = [name for name in ("cka_distance", "weight_distance") if screened[name].notna().any()]
        measured += [(name.replace("_", " "), screened, name) for name in names]
    rows = []
    for name, table, measure in measured:
        auc = truth_auc(table, kinds, measure)
        rows.append([name, f"{auc['auc']:.2f} [{auc['low']:.2f}, {auc['high']:.2f}]", auc["experts"]])
    return (
        "The chance that a replacement trained on the expert's kind of text is nearer than one trained on another "
        "kind; a guess has 0.50.\n\n" + markdown(["measure", "AUC", "experts"], rows)
    )


def _distance(study: KeptSimilarity) -> str | None:
    swaps = study.folder.table("swap")
    if swaps is None:
        return None
    lines = [_regression(name, fit) for name, fit in distance_regressions(swaps).items()]
    heads = ["swap, measure", "with distance the effect", "per layer of distance", "rank correlation", "p", "swaps"]
    layouts = [_layout(name, scores, swaps) for name, scores in layer_tables(swaps).items()]
    return "\n\n".join(["", *([markdown(heads, lines)] if lines else []), _by_distance(swaps), *layouts])


def _regression(name: str, fit: Mapping[str, float]) -> list[Any]:
    interval = "" if math.isnan(fit["low"]) else f" [{fit['low']:+.4f}, {fit['high']:+.4f}]"
    return [
        name, change_in_words(fit), f"{fit['slope']:+.4f}{interval}", f"{fit['spearman']:.2f}",
        f"{fit['p_value']:.3f}", f"{fit['swaps']:.0f}",
    ]  # fmt: skip


def _layout(name: str, scores: pd.DataFrame, swaps: pd.DataFrame) -> str:
    """The scores with two layers in each other's place, in the published layout."""
    rows = [
        [f"**{layer}**", *("" if math.isnan(score) else f"{score:.4f}" for score in line)]
        for layer, line in zip(scores.index, scores.to_numpy(), strict=True)
    ]
    baseline = kinds(swaps)[name]["baseline"].iloc[0]
    return (
        f"Scores by the layers swapped ({name}), the second across; {baseline:.4f} without a swap:\n\n"
        + markdown(["", *map(str, scores.columns)], rows)
    )  # fmt: skip


def _by_distance(swaps: pd.DataFrame) -> str:
    """Mean effects by distance; at 0 an expert or layer with itself, or experts of one layer with each other."""
    rows = []
    for name, part in kinds(swaps).items():
        alike = (swaps["unit"] == part["unit"].iloc[0]) & (swaps["metric"] == part["metric"].iloc[0])
        random = swaps.loc[alike & swaps["distance"].isna(), "effect"]
        means = part.groupby("distance")["effect"].agg(["mean", "count"])
        shown = ", ".join(f"{int(at)}: {row['mean']:+.4f} ({row['count']:.0f})" for at, row in means.iterrows())
        worst = "" if random.empty else f"{random.mean():+.4f} ({len(random)})"
        rows.append([name, f"{part['baseline'].iloc[0]:.4f}", shown, worst])
    return markdown(["swap, measure", "without swap", "mean effect by distance (swaps)", "random weights"], rows)


def _merging(study: KeptSimilarity) -> str | None:
    curve = study.folder.table("compression")
    if curve is None:
        return None
    largest = largest_compression(curve, _WITHIN).set_index(["method", "domain"])
    rows = []
    for (method, domain), part in curve.groupby(["method", "domain"], sort=False):
        ratios = part.groupby("budget")["ratio"].mean().sort_index(ascending=False)
        most = largest.loc[(method, domain)]
        shown = ", ".join(f"{budget:.0%}: {ratio:.3f}" for budget, ratio in ratios.items())
        end = "perhaps more" if math.isnan(most["high"]) else f"{most['high']:.0%}"
        rows.append([method, domain, f"{most['removed']:.0%} ({most['low']:.0%} to {end})", shown])
    heads = ["merging by", "text", f"can go within {_WITHIN:.0%}", "perplexity ratio by share kept"]
    return "\n\n" + markdown(heads, rows)


def _rerouting(study: KeptSimilarity) -> str | None:
    table = study.folder.table("rerouting")
    if table is None:
        return None
    rows = [
        [
            *(row[name] for name in ("how", "what", "reach", "domain")),
            f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        ]
        for row in table.to_dict("records")
    ]
    removed = json.loads(table["experts"].iloc[0])
    return (
        f"{len(removed)} experts removed, the most used of each layer.\n\n"
        + markdown(["tokens go to", "expert is", "within", "text", "perplexity ratio"], rows)
    )  # fmt: skip


def _per_aligner(study: KeptSimilarity, words: Callable[[pd.DataFrame], str]) -> str | None:
    """An answer for each aligner of the study; None where nothing was aligned."""
    table = study.folder.table("alignment")
    if table is None:
        return None
    return "\n\n".join(f"Aligner {name}: {words(rows)}" for name, rows in by_aligner(table).items())
