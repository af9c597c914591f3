"""Redundancy per layer: how far apart the experts of a layer are, raw and normalised, as two charts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from lamella.lab.report.curves import Chart, line_chart, require_columns
from lamella.lab.report.formatting import number_text
from lamella.lab.report.sections import draw, section

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


@dataclass(frozen=True)
class RedundancyView:
    """The finding in words and the charts of the two distances, a line per stack and module."""

    sentence: str
    charts: tuple[Chart, ...]


def redundancy_view(redundancy: pd.DataFrame) -> RedundancyView | None:
    """Lay out the distances; None where no layer has one.

    Args:
        redundancy: columns stack, layer, module, raw and normalised: the mean over pairs of a module's experts of the
            Frobenius distance between their deltas, as it is and over the deltas' mean norm. A layer with a single
            expert has no distance: NaN.

    Raises:
        LamellaError: a column is missing.
    """
    require_columns(redundancy, ("stack", "layer", "module", "raw", "normalised"), "redundancy")
    frame = redundancy[redundancy["normalised"].notna()]
    if frame.empty:
        return None
    stacks = frame["stack"].nunique()
    frame = frame.assign(line=[_line_name(row.stack, row.module, stacks) for row in frame.itertuples()])
    titles = {"normalised": "Normalised: distance over the mean size of an update", "raw": "Raw: Frobenius distance"}
    charts = (line_chart(frame, "line", "layer", column, title, (0.0,)) for column, title in titles.items())
    return RedundancyView(_sentence(frame), tuple(chart for chart in charts if chart))


def _line_name(stack: str, module: str, stacks: int) -> str:
    return f"{stack} · {module}" if stacks > 1 else str(module)


def _sentence(frame: pd.DataFrame) -> str:
    """The most and the least redundant layer, by the normalised distance averaged over the layer's modules."""
    layers = frame.groupby(["stack", "layer"], sort=False)["normalised"].mean()
    if len(layers) == 1:
        return f"The experts of {_place(layers.index[0])} are {number_text(layers.iloc[0])} apart (normalised)."
    low, high = layers.idxmin(), layers.idxmax()
    return (
        f"The experts are most alike in {_place(low)} ({number_text(layers[low])} apart, normalised) "
        f"and least alike in {_place(high)} ({number_text(layers[high])})."
    )


def _place(key: tuple[str, int]) -> str:
    return f"{key[0]} layer {key[1]}"


@section("Redundancy", 70, absent="redundancy per layer")
def redundancy_section(report: Report) -> Markup | None:
    """How far apart the experts of each layer are."""
    view = None if report.redundancy is None else redundancy_view(report.redundancy)
    return None if view is None else draw("redundancy", view)
