"""Few cases of a product of axes in which any two values of two axes still meet."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases of the product, each the one in which most pairs of values meet for the first time."""
    places = [tuple(range(len(axis))) for axis in axes]
    missing = {((one, a), (two, b)) for one, two in combinations(range(len(axes)), 2)
               for a, b in product(places[one], places[two])}  # fmt: skip
    cases = []
    while missing:
        case = max(product(*places), key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(case)
        cases.append(tuple(axis[at] for axis, at in zip(axes, case, strict=True)))
    return cases


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(combinations(enumerate(case), 2))
