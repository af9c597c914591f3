"""Routing by task: which experts of which layer serve which of several tasks, and how unlike tasks are routed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from lamella.lab.report.curves import Chart, line_chart
from lamella.lab.report.formatting import number_text
from lamella.lab.report.heatmap import BANDS, RoutingView, routing_view
from lamella.lab.report.sections import draw, section
from lamella.lab.report.tables import Table, frame_table
from lamella.lab.runs.by_task import differences

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report


@dataclass(frozen=True)
class TasksView:
    """The finding in words, the difference over depth, a table of pairs of tasks, and a heat-map of each task."""

    sentence: str
    chart: Chart | None
    pairs: tuple[Table, ...]
    heat: RoutingView | None


def tasks_view(by_task: pd.DataFrame) -> TasksView | None:
    """Lay out a trace by task; None where fewer than two tasks were traced.

    Args:
        by_task: the frame of a trace with the columns ``method`` and ``task``.
    """
    apart = pd.concat(
        [differences(rows).assign(method=method) for method, rows in by_task.groupby("method", sort=False)]
    )
    if apart.empty:
        return None
    several = by_task["method"].nunique() > 1
    lines = apart.assign(line=apart["method"] if several else apart["stack"])
    over_depth = lines.groupby(["line", "layer"], sort=False, as_index=False)["difference"].mean()
    chart = line_chart(over_depth, "line", "layer", "difference", "Difference between tasks, mean over pairs", (0.0,))
    tables = tuple(_pairs(str(method), rows, several) for method, rows in apart.groupby("method", sort=False))
    named = by_task["method"] + ", " + by_task["task"] if several else by_task["task"]
    return TasksView(_sentence(apart), chart, tables, routing_view(by_task.assign(stack=named)))


def _pairs(method: str, apart: pd.DataFrame, several: bool) -> Table:
    """Tasks by tasks, the mean over layers."""
    mean = apart.groupby(["task", "other"], sort=False)["difference"].mean()
    table = mean.unstack().rename_axis(None, axis=1).reset_index()
    words = f"Difference between tasks{f', {method}' if several else ''}, mean over layers"
    return frame_table(table, words, missing="", first="task")


def _sentence(apart: pd.DataFrame) -> str:
    layers = apart.groupby("layer")["difference"].mean()
    pairs = apart.groupby(["task", "other"], sort=False)["difference"].mean()
    far, near = pairs.idxmax(), pairs.idxmin()
    text = f"Tasks are routed most differently in layer {layers.idxmax()} ({number_text(layers.max())})"
    text += f" and most alike in layer {layers.idxmin()} ({number_text(layers.min())})."
    if far != near:
        text += f" The tasks furthest apart are {far[0]} and {far[1]}, the closest {near[0]} and {near[1]}."
    return text


@section("Routing by task", 25)
def tasks_section(report: Report) -> Markup | None:
    """Which experts serve which task."""
    view = None if report.by_task is None else tasks_view(report.by_task)
    return None if view is None else draw("tasks", view, BANDS)
