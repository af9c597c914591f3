"""Matrices of similarity as heat-maps: layer by layer, and expert by expert of one pair of layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from lamella.reporting.curves import require_columns

PAIR_COLUMNS = ("source_layer", "source_expert", "target_layer", "target_expert", "kind", "aligner", "seed", "nmse")
# Upper ends of the colour bands of the unexplained share; the last begins where the mean predictor is as good.
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
    """The value as text, its colour, and the pair in words; colour 6 is the most similar, as in the legend."""

    text: str
    band: int
    detail: str


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


def pair_means(alignment: pd.DataFrame, aligner: str | None = None) -> pd.DataFrame:
    """Ordered pairs with the mean unexplained share over the seeds of one aligner; the first one's where none is named.

    Raises:
        LamellaError: a column is missing.
    """
    require_columns(alignment, PAIR_COLUMNS, "alignment")
    pairs = alignment[alignment["kind"].isin(["pair", "self"])]
    if pairs.empty:
        return pairs
    chosen = pairs[pairs["aligner"] == (aligner or pairs["aligner"].iloc[0])]
    places = ["source_layer", "source_expert", "target_layer", "target_expert", "kind"]
    return chosen.groupby(places, as_index=False)["nmse"].mean()


def layer_matrices(pairs: pd.DataFrame) -> tuple[Matrix, ...]:
    """Layer by layer, of pairs of two different experts: the best stand-in of each expert, and all of them."""
    others = pairs[pairs["kind"] == "pair"]
    if others.empty:
        return ()
    best = others.groupby(["source_layer", "source_expert", "target_layer"], as_index=False)["nmse"].min()
    return (
        _layers(best, "best stand-in", "the best stand-in of each expert, mean over the experts"),
        _layers(others, "all pairs", "mean over all pairs"),
    )


def expert_matrices(pairs: pd.DataFrame) -> tuple[Matrix, ...]:
    """Expert by expert for pairs of layers; where there are many, those with the best stand-ins."""
    panels = {(int(s), int(t)): rows for (s, t), rows in pairs.groupby(["source_layer", "target_layer"])}
    chosen = sorted(panels, key=lambda at: panels[at].loc[panels[at]["kind"] == "pair", "nmse"].min())[:_MOST_PANELS]
    return tuple(_experts(panels[at], *at) for at in sorted(chosen))


def _layers(frame: pd.DataFrame, name: str, what: str) -> Matrix:
    table = frame.pivot_table(index="source_layer", columns="target_layer", values="nmse", aggfunc="mean")
    return _matrix(
        table, name, ("layer of the expert replaced", "layer of the stand-in"),
        lambda source, target: f"layer {source} by layer {target}: {what}",
    )  # fmt: skip


def _experts(frame: pd.DataFrame, source_layer: int, target_layer: int) -> Matrix:
    table = frame.pivot_table(index="source_expert", columns="target_expert", values="nmse")
    return _matrix(
        table,
        f"{source_layer} by {target_layer}",
        (f"expert of layer {source_layer}", f"stand-in of layer {target_layer}"),
        lambda source, target: f"expert {source} of layer {source_layer} by expert {target} of layer {target_layer}",
    )


def _matrix(table: pd.DataFrame, name: str, axes: tuple[str, str], words: Callable[[int, int], str]) -> Matrix:
    columns: Sequence[int] = [int(column) for column in table.columns]
    dense = len(columns) > _MOST_COLUMNS_WITH_TEXT
    rows = tuple(
        (
            str(source),
            tuple(_cell(float(value), words(int(source), target)) for target, value in zip(columns, row, strict=True)),
        )
        for source, row in zip(table.index, table.to_numpy(), strict=True)
    )
    return Matrix(name, *axes, tuple(map(str, columns)), rows, dense)


def _cell(value: float, words: str) -> MatrixCell | None:
    if math.isnan(value):
        return None
    band = next(at for at, (end, _) in enumerate(BANDS) if value < end)
    return MatrixCell(f"{value:.2f}", 6 - band, f"{words}: {value:.3f}")
