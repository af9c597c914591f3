"""Entropy over training: a chart of the routers' entropy and, where they were logged, of balance and dead experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lamella.lab.report.curves import Chart, line_chart, require_columns
from lamella.lab.report.sections import draw, section

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


# column, title, values the axis must hold
_CHARTS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("entropy", "Entropy, as a share of its maximum", (1.0,)),
    ("balance", "Balance, E · Σ weight²: 1 is even use", (1.0,)),
    ("dead_experts", "Dead experts", (0.0,)),
)


def training_charts(entropy: pd.DataFrame) -> tuple[Chart, ...]:
    """One chart per measure that has values.

    Args:
        entropy: columns run, step and entropy (share of its maximum, 0..1), and optionally balance and dead_experts.

    Raises:
        LamellaError: a column is missing.
    """
    require_columns(entropy, ("run", "step", "entropy"), "entropy over training")
    charts = (
        line_chart(entropy, "run", "step", column, title, reach)
        for column, title, reach in _CHARTS
        if column in entropy.columns
    )
    return tuple(chart for chart in charts if chart)


@section("Training", 50, absent="entropy over training")
def training_section(report: Report) -> Markup | None:
    """How the routers' entropy went."""
    charts = () if report.entropy is None else training_charts(report.entropy)
    return draw("training", charts) if charts else None
