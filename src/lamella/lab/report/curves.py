"""The geometry of line charts whose lines carry their names: over training, over layers, over the strength of noise."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lamella.errors import LamellaError
from lamella.lab.report.axis import Axis, count_axis, round_axis
from lamella.lab.report.formatting import number_text

_MOST_POINTS = 400  # of one line; more cannot be distinguished at the width of a page
_LABEL = 18  # height of one label in pixels
_HEIGHT = 220  # of a chart with few lines, in pixels


@dataclass(frozen=True)
class Line:
    """One series: its path in a square of 100 × 100, where it ends and where its label stands, in percent from the top.

    `style` numbers the lines of a chart; `words` say the line to who does not see it; `whiskers` are their (left, top,
    bottom) in percent.
    """

    name: str
    style: int
    path: str
    end: tuple[float, float]
    label: float
    last: str
    words: str
    whiskers: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis; ticks as (percent, text), from the left and from the top."""

    title: str
    across: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    height: int


def require_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise `LamellaError` where the frame lacks one of the columns."""
    absent = [name for name in columns if name not in frame.columns]
    if absent:
        raise LamellaError(f"The table of {what} lacks the columns {', '.join(absent)}; it needs {', '.join(columns)}.")


def line_chart(
    frame: pd.DataFrame,
    series: str,
    x: str,
    y: str,
    title: str,
    reach: Iterable[float] = (),
    whiskers: tuple[str, str] | None = None,
    distribution: bool = False,
) -> Chart | None:
    """A line per series; None where no row has a value.

    Args:
        frame: columns `series` (text), `x` (numbers, counted where all are whole) and `y` (numbers; rows without one
            are left out).
        reach: values the vertical axis must hold, whatever the data.
        whiskers: columns of the lower and the upper end of a whisker at each point, finite where `y` is.
        distribution: whether a line's label says where it is highest, instead of its last value.
    """
    rows = frame[np.isfinite(frame[y].astype(float))]
    if rows.empty:
        return None
    counted = (rows[x] % 1 == 0).all()
    across = count_axis(rows[x].astype(int)) if counted else round_axis(rows[x].astype(float))
    up = round_axis([*rows[y].astype(float), *reach, *rows[list(whiskers or ())].astype(float).to_numpy().flatten()])
    groups = [(str(name), group.sort_values(x)) for name, group in rows.groupby(series, sort=False)]
    height = max(_HEIGHT, _LABEL * (len(groups) + 1))
    ends = [100 - up.at(float(group[y].iloc[-1])) for _, group in groups]
    labels = spread(ends, 100 * _LABEL / height)
    lines = tuple(
        _line(
            name,
            style,
            group[x].to_numpy(float),
            group[y].to_numpy(float),
            across,
            up,
            label,
            group[list(whiskers or ())].to_numpy(float),
            distribution,
        )
        for style, ((name, group), label) in enumerate(zip(groups, labels, strict=True))
    )
    y_ticks = tuple((round(100 - place, 2), text) for place, text in up.marks())
    return Chart(title, x, lines, across.marks(), y_ticks, height)


def _line(
    name: str,
    style: int,
    x: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    y: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    across: Axis,
    up: Axis,
    label: float,
    reaches: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",  # (points, 2), or (points, 0) without whiskers
    distribution: bool,
) -> Line:
    shown = thinned(y)
    places = [(across.at(float(x[at])), round(100 - up.at(float(y[at])), 2)) for at in shown]
    path = "M" + "L".join(f"{left} {top}" for left, top in places)
    first, last = number_text(float(y[0])), number_text(float(y[-1]))
    words = f"{name}: {first} at {x[0]:,.10g}, {last} at {x[-1]:,.10g}"
    if distribution:
        last = number_text(float(x[y.argmax()]))
        words = f"{name}: most at {last}"
    whiskers = tuple(
        (across.at(float(place)), round(100 - up.at(float(high)), 2), round(100 - up.at(float(low)), 2))
        for place, (low, high) in zip(x, reaches if reaches.shape[1] else (), strict=False)
    )
    # A line of one point has no length and would not be drawn.
    return Line(name, style, path if len(places) > 1 else f"{path}h0.01", places[-1], label, last, words, whiskers)


def thinned(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> list[int]:
    """Positions to draw: all, or the lowest and highest of each of many equal stretches, so that no spike is lost."""
    if len(values) <= _MOST_POINTS:
        return list(range(len(values)))
    shown = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), _MOST_POINTS // 2):
        shown |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    return sorted(shown)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves places in 0..100 as little as this takes until they are `gap` apart, keeping their order."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved: dict[int, float] = {}
    lowest = gap / 2
    for at in order:
        moved[at] = max(places[at], lowest)
        lowest = moved[at] + gap
    highest = 100 - gap / 2
    for at in reversed(order):
        moved[at] = min(moved[at], highest)
        highest = moved[at] - gap
    return [round(moved[at], 2) for at in range(len(places))]
