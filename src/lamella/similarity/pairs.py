"""Ordered pairs of experts, and the choice of those to train an aligner for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lamella.errors import LamellaError

if TYPE_CHECKING:
    import pandas as pd

Name = tuple[int, int]  # layer, expert
Pair = tuple[Name, Name]  # source, target
NAMES = ["source_layer", "source_expert", "target_layer", "target_expert"]  # columns of tables of pairs


def all_pairs(experts: Sequence[Name]) -> list[Pair]:
    """Every ordered pair of two experts, of one layer or of two: ``N (N - 1)``, sorted."""
    ordered = sorted(experts)
    return [(source, target) for source in ordered for target in ordered if source != target]


def check_pairs(pairs: Iterable[Pair], experts: Sequence[Name]) -> list[Pair]:
    """The pairs, sorted and each once.

    Raises:
        LamellaError: a pair names an expert that was not captured.
    """
    known = set(experts)
    ordered = sorted(set(pairs))
    if unknown := next((name for pair in ordered for name in pair if name not in known), None):
        raise LamellaError(
            f"Expert {unknown[1]} of layer {unknown[0]} is in a pair to compare but not in the capture, which has "
            f"{len(known)} experts of the layers {sorted({layer for layer, _ in known})}. Name a captured expert."
        )
    return ordered


def choose_pairs(screened: pd.DataFrame, per_source: int) -> list[Pair]:
    """The targets of each source that promise most: least predicted error, or, in a table without it, lowest floor.

    Then CKA distance and weight distance decide: the floor cannot tell targets apart where experts have as many hidden
    units as the model is wide. A source whose pairs were not measured (NaN) has none.

    Raises:
        LamellaError: fewer than one pair asked for each source, or neither was measured.
    """
    if per_source < 1:
        raise LamellaError(f"per_source must be at least 1, not {per_source}: it is how many targets a source keeps.")
    by = next((name for name in ("predicted", "floor") if name in screened and screened[name].notna().any()), None)
    if by is None:
        raise LamellaError(
            "The screen has no predicted error and no floor to choose pairs by; screen again with one of them, on a "
            "capture with samples."
        )
    source, target = NAMES[:2], NAMES[2:]
    promising = screened.dropna(subset=[by]).sort_values(
        [*source, by, "cka_distance", "weight_distance", *target], kind="stable"
    )
    chosen = promising.groupby(source, sort=False).head(per_source)
    rows = chosen[NAMES].itertuples(index=False, name=None)
    return sorted(((int(a), int(b)), (int(c), int(d))) for a, b, c, d in rows)
