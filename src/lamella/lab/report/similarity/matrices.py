"""Matrices of similarity as heat-maps: layer by layer, and expert by expert of one pair of layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lamella.lab.report.curves import require_columns
from lamella.similarity.alignment import beyond_controls
from lamella.similarity.alignment.table import by_aligner

PAIR_COLUMNS = (
    "source_layer", "source_expert", "target_layer", "target_expert", "kind", "aligner", "seed", "nmse",
    "over_mean", "over_identity", "over_random",
)  # fmt: skip
MARK = "•"
# Upper ends of the colour bands of the normalised error; the last begins where the mean predictor is as good.
BANDS = (
    (0.1, "below 0.1"),
    (0.3, "0.1 to 0.3"),
    (0.5, "0.3 to 0.5"),
    (0.7, "0.5 to 0.7"),
    (0.9, "0.7 to 0.9"),
    (1.0, "0.9 to 1"),
    (math.inf, "1 and more: no better than the mean"),
)
_MOST_PANELS = 16
_MOST_COLUMNS_WITH_TEXT = 16


@dataclass(frozen=True)
class MatrixCell:
    """The value as text, its colour, and the pair in words; colour 6 is the most similar, as in the legend.

    ``mark`` stands beside the value, and alone where there is no room for it.
    """

    text: str
    band: int
    detail: str
    mark: str = ""


@dataclass(frozen=True)
class Matrix:
    """A square of cells, None where nothing was measured; ``dense`` ones show colours alone."""

    name: str
    down: str
    across: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[MatrixCell | None, ...]], ...]
    dense: bool


def legend() -> list[tuple[int, str]]:
    """The colours with their words, the most similar first."""
    return [(6 - at, words) for at, (_, words) in enumerate(BANDS)]


def pair_means(alignment: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By aligner, ordered pairs with the mean normalised error over the seeds.

    ``beyond`` says of a pair of two experts whether it is better than its controls with every seed.

    Raises:
        LamellaError: a column is missing.
    """
    require_columns(alignment, PAIR_COLUMNS, "alignment")
    pairs = beyond_controls(alignment[alignment["kind"].isin(["pair", "self"])])
    pairs = pairs.assign(beyond=pairs["beyond"] & (pairs["kind"] == "pair"))
    places = ["source_layer", "source_expert", "target_layer", "target_expert", "kind"]
    return {
        aligner: rows.groupby(places, as_index=False).agg(nmse=("nmse", "mean"), beyond=("beyond", "all"))
        for aligner, rows in by_aligner(pairs).items()
    }


def layer_matrices(pairs: pd.DataFrame) -> tuple[Matrix, ...]:
    """Layer by layer, of pairs of two different experts: the best replacement of each expert, and all of them."""
    others = pairs[pairs["kind"] == "pair"]
    if others.empty:
        return ()
    best = others.loc[others.groupby(["source_layer", "source_expert", "target_layer"])["nmse"].idxmin()]
    return (
        _layers(best, "best replacement", "the best replacement of each expert, mean over the experts"),
        _layers(others, "all pairs", "mean over all pairs"),
    )


def expert_matrices(pairs: pd.DataFrame) -> tuple[Matrix, ...]:
    """Expert by expert for pairs of layers; where there are many, those with the best replacements."""
    panels = {(int(s), int(t)): rows for (s, t), rows in pairs.groupby(["source_layer", "target_layer"])}
    chosen = sorted(panels, key=lambda at: panels[at].loc[panels[at]["kind"] == "pair", "nmse"].min())[:_MOST_PANELS]
    return tuple(_experts(panels[at], *at) for at in sorted(chosen))


def _layers(frame: pd.DataFrame, name: str, what: str) -> Matrix:
    cells = {}
    for (source, target), rows in frame.groupby(["source_layer", "target_layer"]):
        beyond = int(rows["beyond"].sum())
        cells[source, target] = _cell(
            rows["nmse"].mean(), f"layer {source} by layer {target}: {what}", beyond == len(rows),
            f"{beyond} of {len(rows)} pairs beyond their controls",
        )  # fmt: skip
    return _matrix(cells, name, ("layer of the expert replaced", "layer of the replacement"))


def _experts(frame: pd.DataFrame, source_layer: int, target_layer: int) -> Matrix:
    cells = {}
    for row in frame.itertuples():
        words = (
            f"expert {row.source_expert} of layer {source_layer} by expert {row.target_expert} of layer {target_layer}"
        )
        said = "a control" if row.kind == "self" else "beyond its controls" if row.beyond else "not beyond its controls"
        cells[row.source_expert, row.target_expert] = _cell(row.nmse, words, row.beyond, said)
    axes = (f"expert of layer {source_layer}", f"replacement of layer {target_layer}")
    return _matrix(cells, f"{source_layer} by {target_layer}", axes)


def _matrix(cells: Mapping[tuple[int, int], MatrixCell | None], name: str, axes: tuple[str, str]) -> Matrix:
    sources, targets = (sorted({pair[end] for pair in cells}) for end in (0, 1))
    rows = tuple((str(source), tuple(cells.get((source, target)) for target in targets)) for source in sources)
    return Matrix(name, *axes, tuple(map(str, targets)), rows, dense=len(targets) > _MOST_COLUMNS_WITH_TEXT)


def _cell(value: float, words: str, beyond: bool, said: str) -> MatrixCell | None:
    if math.isnan(value):
        return None
    band = next(at for at, (end, _) in enumerate(BANDS) if value < end)
    return MatrixCell(f"{value:.2f}", 6 - band, f"{words}: {value:.3f}, {said}", MARK if beyond else "")
