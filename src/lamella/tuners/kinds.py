"""Which values a setting takes: as its type hint says, with no number for a truth value and no text for a number."""

import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", NoneType: "None"}


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, in ``Annotated[float, Bounds(0, below=1)]``."""

    least: float
    most: float = math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        """Whether a number is inside."""
        return self.least <= value <= self.most and value < self.below

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"from {self.least:,} to {self.most:,}"
        return f"of at least {self.least:g}" + (f" and below {self.below:g}" if self.below < math.inf else "")


MOST = 1_000_000  # no matrix of a model is as wide, and what is counted here would not fit into memory
Count = Annotated[int, Bounds(1, MOST)]
Index = Annotated[int, Bounds(0, MOST)]
Alpha = Annotated[float, Bounds(-MOST, MOST)]
Coefficient = Annotated[float, Bounds(0, MOST)]
Share = Annotated[float, Bounds(0, below=1)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that a hint names. Numbers must be finite."""
    kind, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Annotated:
        return fits(value, inside[0]) and all(bounds.hold(value) for bounds in inside[1:])
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inside)
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if kind in (list, set):
        return isinstance(value, kind) and all(fits(one, inside[0]) for one in value)
    if kind is tuple:  # a list in JSON
        return isinstance(value, list | tuple) and len(value) == len(inside) and all(map(fits, value, inside))
    if kind is dict:
        return isinstance(value, dict) and all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    if hint in (int, float):
        numbers = int if hint is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind or hint)


def in_words(hint: Any) -> str:
    """What a hint allows, for an error."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return " ".join([in_words(inside[0]), *map(str, inside[1:])])
    if kind in (Union, UnionType):
        return ", or ".join(map(in_words, inside))
    if kind is Literal:
        return f"one of {', '.join(map(repr, inside))}" if len(inside) > 1 else repr(inside[0])
    if kind in (list, set):
        return f"a {kind.__name__}, each entry {in_words(inside[0])}"
    if kind is tuple:
        return f"a list of {' and '.join(map(in_words, inside))}"
    if kind is dict:
        return "a dictionary"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
