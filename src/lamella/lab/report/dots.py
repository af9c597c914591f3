"""The geometry of the dot plot: where each method's mean, seeds and interval stand on a shared axis, in percent."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lamella.lab.report.axis import Axis, round_axis
from lamella.lab.report.formatting import as_interval, is_number, number_text

_SEED = re.compile(r"seed[ _]?\d+", re.IGNORECASE)
_FLOOR = re.compile(r"\bfloor\b", re.IGNORECASE)


@dataclass(frozen=True)
class Mark:
    """One method: places in percent, None or empty where it has no such value."""

    method: str
    value: str
    mean: float | None
    seeds: tuple[float, ...]
    interval: tuple[float, float] | None
    words: str


@dataclass(frozen=True)
class DotPlot:
    """One task and metric: marks, ticks as (place, text), and the floor as (place, text)."""

    title: str
    marks: tuple[Mark, ...]
    ticks: tuple[tuple[float, str], ...]
    floor: tuple[float, str] | None


def dot_plots(results: pd.DataFrame) -> tuple[DotPlot, ...]:
    """One plot per (task, metric) of the results, none where no method has a mean.

    The columns read are "mean", "seed 0", "seed 1", ... and "interval", the (low, high) of the mean. The floor is the
    first method whose name holds the word "floor".
    """
    if "mean" not in results.columns:
        return ()
    keys = [name for name in ("task", "metric") if name in results.columns]
    groups = results.groupby(keys, sort=False, dropna=False) if keys else [((), results)]
    return tuple(
        _plot(" · ".join(map(str, key)), rows.to_dict("records"))
        for key, rows in groups
        if any(is_number(mean) for mean in rows["mean"])
    )


def _plot(title: str, rows: list[dict[str, Any]]) -> DotPlot:
    axis = round_axis(value for row in rows for value in _values(row))
    floors = [row["mean"] for row in rows if _FLOOR.search(str(row["method"])) and is_number(row["mean"])]
    return DotPlot(
        title=title,
        marks=tuple(_mark(row, axis) for row in rows),
        ticks=axis.marks(),
        floor=(axis.at(floors[0]), number_text(floors[0])) if floors else None,
    )


def _values(row: dict[str, Any]) -> Iterator[float]:
    """Every finite value of a row that the axis must reach."""
    candidates = (row["mean"], *_seeds(row).values(), *(as_interval(row.get("interval")) or ()))
    return (float(value) for value in candidates if is_number(value) and math.isfinite(value))


def _seeds(row: dict[str, Any]) -> dict[str, float]:
    return {
        str(name): float(value)
        for name, value in row.items()
        if _SEED.fullmatch(str(name)) and is_number(value) and math.isfinite(value)
    }


def _mark(row: dict[str, Any], axis: Axis) -> Mark:
    mean, seeds, interval = row["mean"], _seeds(row), as_interval(row.get("interval"))
    drawn = is_number(mean) and math.isfinite(mean)
    value = number_text(mean) if is_number(mean) else "not run"
    words = [f"{row['method']}: mean {value}" if is_number(mean) else f"{row['method']}: not run"]
    words += [f"{name} {number_text(seed)}" for name, seed in seeds.items()]
    words += [f"interval {number_text(interval[0])} to {number_text(interval[1])}"] if interval else []
    return Mark(
        method=str(row["method"]),
        value=value,
        mean=axis.at(mean) if drawn else None,
        seeds=tuple(axis.at(seed) for seed in seeds.values()),
        interval=(axis.at(interval[0]), axis.at(interval[1])) if interval else None,
        words=", ".join(words),
    )
