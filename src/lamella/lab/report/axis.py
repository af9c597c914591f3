"""Linear axes of the figures: round ends and ticks, places in percent of the axis' length."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SAME = 1e-9  # values closer than this stand on one spot
_MARGIN = 3.0  # percent kept free at both ends, so that a dot at the end is drawn whole


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with a few round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The place of a value, in percent of the axis' length."""
        return round(_MARGIN + (100 - 2 * _MARGIN) * (value - self.low) / (self.high - self.low), 2)

    def marks(self) -> tuple[tuple[float, str], ...]:
        """The ticks as (place, text)."""
        return tuple((self.at(tick), f"{tick:,.10g}") for tick in self.ticks)


def round_axis(values: Iterable[float]) -> Axis:
    """Round ends just outside the values, four to seven ticks 1, 2 or 5 times a power of ten apart."""
    values = list(values)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=_SAME):
        reach = abs(low) * 0.05 if abs(low) > _SAME else 0.5
        low, high = low - reach, high + reach
    step = _step((high - low) / 4)
    return _axis(step, math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9))


def count_axis(values: Iterable[int]) -> Axis:
    """From the lowest to the highest count, such as a layer or a training step, with ticks at round counts between."""
    values = sorted(values)
    low, high = values[0], values[-1]
    if low == high:
        return Axis(low - 0.5, high + 0.5, (low,))
    step = max(_step((high - low) / 5), 1.0)
    inside = _axis(step, math.ceil(low / step), math.floor(high / step))
    return Axis(low, high, inside.ticks)


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _axis(step: float, first: int, last: int) -> Axis:
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)
