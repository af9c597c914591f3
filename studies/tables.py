"""Tables in Markdown, and figures in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lamella.statistics import Contrast


def markdown(heads: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def number(value: float, sign: str = "") -> str:
    """With three digits after the point."""
    # halves of the last digit, which shares of examples often are, must not hang on the last bit
    return f"{round(value, 9) + 0.0:{sign}.3f}"


def p_value(value: float) -> str:
    """A chance, not more exact than 10,000 draws make it."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def interval(one: Contrast) -> str:
    """A difference with its 95 % interval."""
    difference, low, high = (
        number(value, "+") for value in (one.interval.difference, one.interval.low, one.interval.high)
    )
    return f"{difference} [{low}, {high}]"


def difference_in_words(one: Contrast) -> str:
    """A difference with its interval and p-value."""
    return f"{interval(one)}, p {p_value(one.p_value)}"
