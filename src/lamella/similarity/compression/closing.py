"""Which tokens find their expert closed: all of them, or those over its capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lamella.backbones.moe import Dispatch
from lamella.errors import LamellaError
from lamella.similarity.screening.pairs import Name

What = Literal["dropped", "masked", "full"]
First = Literal["arrival", "weight"]


@dataclass(frozen=True)
class Closing:
    """Experts, and when they are closed to a token.

    Attributes:
        experts: as (layer, expert).
        what: "dropped", they are not in the model any more, and the router does not know; "masked", they may not be
            used, and the router knows; "full", each takes at most ``capacity`` tokens of a sequence.
        capacity: real tokens of one sequence that an expert takes in one forward; only where experts are full.
        first: which tokens those are: the first to arrive, or those that it has the largest weights for, which a
            token later in the text can then push out.
    """

    experts: Sequence[Name]
    what: What = "dropped"
    capacity: int | None = None
    first: First = "arrival"

    def __post_init__(self) -> None:
        if self.what not in get_args(What) or self.first not in get_args(First):
            raise LamellaError(
                f"what={self.what!r}, first={self.first!r}: an expert is one of {', '.join(get_args(What))}, and full "
                f"ones take tokens by {' or '.join(get_args(First))}."
            )
        if (self.what == "full") != (self.capacity is not None):
            raise LamellaError('capacity= says when an expert is full: give it with what="full", and only then.')
        if self.capacity is not None and self.capacity < 0:
            raise LamellaError(f"capacity={self.capacity} is no number of tokens; give 0 or more.")
        if len(set(self.experts)) < len(self.experts):
            raise LamellaError("An expert is named twice among those that are closed; name each once.")

    def of(self, layer: int) -> list[int]:
        """The closed experts of a layer."""
        return [expert for index, expert in self.experts if index == layer]

    def turned_away(self, dispatch: Dispatch) -> Tensor:
        """Where a token finds an expert that it chose closed, ``(N, k)``; padding never does where experts are full."""
        away = torch.zeros_like(dispatch.routing.indices, dtype=torch.bool)
        for expert in self.of(dispatch.layer.index):
            chose = chosen(dispatch, expert)
            if self.capacity is not None:
                chose = chose & _over(dispatch, chose, self.capacity, self.first)[:, None]
            away |= chose
        return away


def chosen(dispatch: Dispatch, expert: int) -> Tensor:
    """Where an expert was chosen and had room by the model's own rules, ``(N, k)``."""
    here = dispatch.routing.indices == expert
    return here if dispatch.routing.kept is None else here & dispatch.routing.kept


def _over(dispatch: Dispatch, chose: Tensor, capacity: int, first: First) -> Tensor:
    """Which tokens ``(N,)`` are beyond the capacity of the expert that they chose, ``(N, k)``."""
    takes = (chose.any(dim=-1) & dispatch.real).view(dispatch.shape)  # (batch, tokens)
    if first == "arrival":
        return (takes & (takes.cumsum(dim=-1) > capacity)).flatten()
    weights = (dispatch.routing.weights * chose).sum(dim=-1).view(dispatch.shape)
    order = weights.masked_fill(~takes, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # (batch, tokens); of equal weights the first to arrive comes first
    return (takes & (rank >= capacity)).flatten()
