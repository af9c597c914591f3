"""Points in a plane: damage of swaps over the distance of their layers, tokens in their principal plane."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lamella.lab.report.axis import round_axis

_HEIGHT = 300


@dataclass(frozen=True)
class Points:
    """One colour: its name and the places of its points, in percent from the left and from the top."""

    name: str
    style: int
    places: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Scatter:
    """Groups of points over two axes, and a line through them where there is one."""

    title: str
    across: str
    up: str
    groups: tuple[Points, ...]
    line: tuple[float, float, float, float] | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    height: int


def scatter(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    group: str,
    title: str,
    words: str,
    line: Mapping[str, float] | None = None,
    reach: Sequence[float] = (),
) -> Scatter | None:
    """Points of a frame; None where there is none.

    Args:
        frame: columns ``x``, ``y`` (numbers), ``group`` (what colours) and ``words`` (what a point is).
        line: intercept and slope of a line to draw.
        reach: values that the vertical axis must hold.
    """
    rows = frame.dropna(subset=[x, y])
    if rows.empty:
        return None
    across, up = round_axis(rows[x].astype(float)), round_axis([*rows[y].astype(float), *reach])
    groups = tuple(
        Points(
            str(name),
            style,
            tuple(
                (across.at(float(left)), round(100 - up.at(float(top)), 2), str(what))
                for left, top, what in zip(part[x], part[y], part[words], strict=True)
            ),
        )
        for style, (name, part) in enumerate(rows.groupby(group, sort=True))
    )
    drawn = None
    if line is not None:
        ends = [float(rows[x].min()), float(rows[x].max())]
        heights = [round(100 - up.at(line["intercept"] + line["slope"] * end), 2) for end in ends]
        drawn = (across.at(ends[0]), heights[0], across.at(ends[1]), heights[1])
    y_ticks = tuple((round(100 - place, 2), text) for place, text in up.marks())
    return Scatter(title, x, y, groups, drawn, across.marks(), y_ticks, _HEIGHT)
