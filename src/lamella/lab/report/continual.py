"""Forgetting curves: the accuracy on each task after each stage of learning tasks one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lamella.lab.report.curves import Chart, line_chart
from lamella.lab.report.sections import draw, section
from lamella.lab.studies.continual import curves
from lamella.lab.studies.study import Study

if TYPE_CHECKING:
    from markupsafe import Markup

    from lamella.lab.report.report import Report

_NTH = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


def forgetting_charts(stages: pd.DataFrame) -> tuple[Chart, ...]:
    """A chart of the mean over the tasks so far, then one for each task but the last, a line per method.

    Args:
        stages: as `lamella.lab.studies.continual.curves`; values are means over runs.
    """
    learned = stages[stages["stage"] >= stages["place"]]
    so_far = learned.groupby(["method", "seed", "stage"], sort=False, as_index=False)["accuracy"].mean()
    frames = {"Mean accuracy on the tasks so far": so_far}
    for place in range(1, int(stages["place"].max())):
        nth = _NTH[place - 1] if place <= len(_NTH) else f"{place}th"
        frames[f"Accuracy on the task learned {nth}"] = learned[learned["place"] == place]
    charts = (
        line_chart(
            frame.groupby(["method", "stage"], sort=False, as_index=False)["accuracy"].mean(),
            "method",
            "stage",
            "accuracy",
            title,
        )
        for title, frame in frames.items()
    )
    return tuple(chart for chart in charts if chart)


@section("Forgetting curves", 10)
def forgetting_section(report: Report) -> Markup | None:
    """What each stage left of the tasks before."""
    if not isinstance(report.about, Study) or (stages := curves(report.about.folder)) is None or stages.empty:
        return None
    return draw("forgetting", forgetting_charts(stages))
