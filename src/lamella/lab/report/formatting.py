"""How one value of a data frame or of the settings is written as text."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd


def is_number(value: Any) -> bool:
    """True for a real number that is there: no flag, no NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def as_interval(value: Any) -> tuple[float, float] | None:
    """The two ends of an interval given as a pair of numbers, None for anything else."""
    if not isinstance(value, tuple | list | np.ndarray) or len(value) != 2:
        return None
    low, high = value
    return (float(low), float(high)) if is_number(low) and is_number(high) else None


def is_missing(value: Any) -> bool:
    """True for None, NaN, NA, NaT, and for a sequence without any value in it."""
    if isinstance(value, tuple | list | np.ndarray):
        return all(is_missing(item) for item in value)
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def number_text(value: float) -> str:
    """Four significant digits where that reads well: 0.873, 12.31, 812.4, 2,304,112."""
    size = abs(value)
    if isinstance(value, Integral) or math.isinf(size) or 1000 <= size < 1e15:
        return f"{value:,.0f}"
    if size >= 1e15 or 0 < size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.{3 - sum(size >= bound for bound in (10, 100))}f}" if size < 100 else f"{value:.1f}"


def number_format(values: Iterable[Any]) -> Callable[[float], str]:
    """The format of a column: counts that became floats beside a missing cell are still written as counts."""
    numbers = [float(value) for value in values if is_number(value)]
    counts = all(value.is_integer() for value in numbers) and max(numbers, default=0.0) >= 2
    return (lambda value: number_text(int(value))) if counts else number_text


def setting_text(value: Any) -> str:
    """A setting as its owner would write it: `true`, `none`, `0.001`, `2, 4, 6, 8`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting_text(item)}" for key, item in value.items()) or "empty"
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return (
            ", ".join(f"({setting_text(item)})" if isinstance(item, Mapping) else setting_text(item) for item in items)
            or "empty"
        )
    return str(value)
