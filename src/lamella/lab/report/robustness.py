"""Scores over the strength of noise: a chart per kind of noise and metric, and the differences as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from lamella.lab.report.curves import Chart, line_chart, require_columns
from lamella.lab.report.sections import draw, section
from lamella.lab.report.tables import Table, frame_table

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


@dataclass(frozen=True)
class RobustnessView:
    """The curves, and how sure the differences between methods are."""

    charts: tuple[Chart, ...]
    differences: Table | None


def robustness_view(scores: pd.DataFrame, differences: pd.DataFrame | None = None) -> RobustnessView | None:
    """Lay out the scores; None where there is none.

    Args:
        scores: columns method, noise, strength, seed, metric and value.
        differences: columns method, against, strength, measure, difference, low, high and p.

    Raises:
        LamellaError: a column is missing.
    """
    require_columns(scores, ("method", "noise", "strength", "seed", "metric", "value"), "scores under noise")
    over_seeds = scores.groupby(["noise", "metric", "method", "strength"], sort=False)["value"]
    points = over_seeds.agg(["mean", "min", "max"]).reset_index()
    charts = [
        line_chart(
            group.rename(columns={"strength": f"strength of the noise ({noise})"}),
            "method",
            f"strength of the noise ({noise})",
            "mean",
            str(metric),
            whiskers=("min", "max"),
        )
        for (noise, metric), group in points.groupby(["noise", "metric"], sort=False)
    ]
    drawn = tuple(chart for chart in charts if chart)
    table = None if differences is None or differences.empty else _table(differences)
    return RobustnessView(drawn, table) if drawn or table else None


def _table(differences: pd.DataFrame) -> Table:
    columns = ("method", "against", "strength", "measure", "difference", "low", "high", "p")
    require_columns(differences, columns, "differences under noise")
    shown = differences[["method", "against", "strength", "measure", "difference"]].assign(
        interval=list(zip(differences["low"], differences["high"], strict=True)), p=differences["p"]
    )
    return frame_table(shown, "Difference from the first method, with its 95 % paired interval", missing="not compared")


@section("Robustness", 40)
def robustness_section(report: Report) -> Markup | None:
    """Scores under noise."""
    if report.robustness is None:
        return None
    view = robustness_view(report.robustness, report.robustness_differences)
    return None if view is None else draw("robustness", view)
