"""How figures stand in Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lamella.lab.studies.measuring import Ratio


def shown(ratio: Ratio) -> str:
    """A ratio's median, quartiles and ratio of minima."""
    return f"{ratio.median:.3f} ({ratio.quartiles[0]:.3f}-{ratio.quartiles[1]:.3f}; min {ratio.minima:.3f})"


def verdict(met: bool) -> str:
    """Whether a target was met, in a table."""
    return "met" if met else "**missed**"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
