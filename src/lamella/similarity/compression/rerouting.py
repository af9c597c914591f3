"""Tokens whose expert is closed to them: to the most similar expert, to none, or to the router's next choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from lamella.backbones.moe import Dispatch, MoELayer, SequencesApart, watch_dispatch
from lamella.errors import LamellaError
from lamella.similarity.compression.routes import Route, Work, find_experts, native_layers
from lamella.similarity.compression.serving import BATCHED, Limit, serving
from lamella.similarity.pairs import Name

if TYPE_CHECKING:
    import pandas as pd

COUNTED = SequencesApart("capacity= counts the tokens of one sequence")


@contextmanager
def reroute(
    model: nn.Module,
    experts: Sequence[Name],
    routes: Mapping[Name, Route] | None = None,
    what: What = "dropped",
    *,
    capacity: int | None = None,
    first: First = "arrival",
    limit: int | None = None,
    damage: pd.DataFrame | None = None,
) -> Iterator[None]:
    """Inside the context, a token that finds its expert closed goes to that expert's route, with the router's weight.

    The route's expert works for it even if the token chose that one too (it then counts with both weights) and even if
    it is full itself. Leaving restores the model bit for bit.

    "limited" is for serving: a batch uses at most ``limit`` experts of a layer, so that fewer weights are read for it.
    Closed are those whose tokens lose least by it: the sum over the batch of their squared weight times ``damage`` by
    the best other expert; each goes to the open one that does it the least damage. One forward decides for each place
    of the sequences by the tokens that stand there, padding aside, as decoding the batch token by token does. So a
    token's output depends on its batch, not on what comes later; sequences packed into one row (continuous batching
    packs them so) are no batch, and are refused. Gradients reach what the tokens went to; choosing where has none. A
    compiled model runs its own code meanwhile.

    Args:
        model: one that came with its experts.
        experts: as (layer, expert), those that may be closed: ``capture.experts`` are all.
        routes: for each of them, taken as they are; see ``find_routes``. None where they are "limited".
        what: "dropped" and "masked" send away every token, "full" those beyond ``capacity``, "limited" those of what a
            batch can do without.
        capacity: real tokens of one sequence that each of the experts takes in one forward.
        first: which tokens a full expert takes: the first to "arrive", or those of largest "weight".
        limit: experts of a layer for one batch; as many as the layer has change nothing.
        damage: what ``lamella.similarity.damages`` gave for the model.

    Raises:
        LamellaError: an expert without route, an expert that the model does not have, a capacity or limit that does
            not belong to ``what``, or experts that transformers does not run by its interface for them.
    """
    overflow, layers = _closing(model, Overflow(experts, what, capacity, first), limit, damage)
    if overflow.limit is not None:
        if routes is not None:
            raise LamellaError('what="limited" finds its routes in damage=; leave routes out.')
        with serving(model, list(layers.values()), overflow.limit):
            yield
        return
    routes = routes or {}
    if missing := [name for name in experts if name not in routes]:
        raise LamellaError(
            f"Expert {missing[0][1]} of layer {missing[0][0]} has no route; find_routes finds one for each."
        )
    works = {name: routes[name].work(layers) for name in experts}
    with _elsewhere(model, layers, overflow, works):
        yield


@contextmanager
def drop(
    model: nn.Module,
    experts: Sequence[Name],
    what: What = "dropped",
    *,
    capacity: int | None = None,
    first: First = "arrival",
    limit: int | None = None,
    damage: pd.DataFrame | None = None,
) -> Iterator[None]:
    """Inside the context, a token gets nothing from an expert that is closed to it.

    "dropped", "full" and "limited": the weights of the token's other experts stay. "masked": they grow in proportion to
    what all of its weights summed to; a token whose experts are all masked gets nothing. Arguments and errors as
    ``reroute``.
    """
    overflow, layers = _closing(model, Overflow(experts, what, capacity, first), limit, damage)
    if what == "masked":
        with _without(model, layers, overflow):
            yield
    else:
        with _elsewhere(model, layers, overflow, dict.fromkeys(experts, torch.zeros_like)):
            yield


@contextmanager
def next_choice(
    model: nn.Module,
    experts: Sequence[Name],
    what: What = "dropped",
    *,
    capacity: int | None = None,
    first: First = "arrival",
    limit: int | None = None,
    damage: pd.DataFrame | None = None,
) -> Iterator[None]:
    """Inside the context, the router decides again for a token that finds experts closed, without those.

    So its next choice takes the place, with the weights that the router then gives; a next choice that is full too
    takes it all the same. Arguments and errors as ``reroute``, and an error where fewer experts are left than each
    token gets.
    """
    overflow, layers = _closing(model, Overflow(experts, what, capacity, first), limit, damage)
    with ExitStack() as stack:
        for layer in layers.values():
            if closed := overflow.of(layer.index):
                if overflow.limit is None and layer.num_experts - len(closed) < layer.top_k:
                    raise LamellaError(
                        f"{len(closed)} closed experts of the {layer.num_experts} of layer {layer.index} leave fewer "
                        f"than the {layer.top_k} that each token gets; close fewer."
                    )
                stack.enter_context(_deciding_again(model, layer, overflow) if overflow.waits else layer.mask(closed))
        yield


def _closing(
    model: nn.Module, overflow: Overflow, limit: int | None, damage: pd.DataFrame | None
) -> tuple[Overflow, dict[int, MoELayer]]:
    """What is closed, with its limit, and the layers by index, if they have the experts."""
    if not (overflow.what == "limited") == (limit is not None) == (damage is not None):
        raise LamellaError('limit= and damage= belong to what="limited": give both with it, and neither otherwise.')
    layers = native_layers(model)
    find_experts(layers, overflow.experts)
    if limit is not None and damage is not None:
        overflow = replace(overflow, limit=Limit.of(layers, overflow.experts, limit, damage))
    return overflow, layers


@contextmanager
def _elsewhere(
    model: nn.Module, layers: Mapping[int, MoELayer], overflow: Overflow, works: Mapping[Name, Work]
) -> Iterator[None]:
    """Inside the context, tokens that are dropped by an expert go to its work, the others to the expert."""
    touched = [layer for index, layer in layers.items() if overflow.of(index)]
    away: dict[Name, Tensor] = {}  # of the tokens that chose the expert in this forward, in their order

    def note(dispatch: Dispatch) -> None:
        dropped = overflow.dropped(dispatch)
        for expert in overflow.of(dispatch.layer.index):
            here = chosen(dispatch, expert)
            away[dispatch.layer.index, expert] = (dropped & here).any(dim=-1)[here.any(dim=-1)]

    def shared(layer: MoELayer, expert: int) -> Work:
        name = (layer.index, expert)

        def work(x: Tensor) -> Tensor:
            output = torch.empty_like(x)
            output[~away[name]] = layer.experts[expert](x[~away[name]])
            output[away[name]] = works[name](x[away[name]]).to(output.dtype)
            return output

        return work

    with ExitStack() as stack:
        if overflow.waits:
            stack.enter_context(watch_dispatch(model, touched, note, overflow.apart))
        for layer in touched:
            closed = overflow.of(layer.index)
            replaced = {e: shared(layer, e) if overflow.waits else works[layer.index, e] for e in closed}
            stack.enter_context(layer.replace(replaced))
        yield


@contextmanager
def _without(model: nn.Module, layers: Mapping[int, MoELayer], overflow: Overflow) -> Iterator[None]:
    """Inside the context, closed experts give nothing and the others of a token as much more, in proportion."""
    touched = [layer for index, layer in layers.items() if overflow.of(index)]
    growth: dict[Name, Tensor] = {}  # of the tokens that chose an open expert, in their order, (n, 1)

    def note(dispatch: Dispatch) -> None:
        weights = dispatch.routing.weights  # (N, k)
        left = weights.masked_fill(overflow.dropped(dispatch), 0)
        factor = torch.where(left.sum(-1) > 0, weights.sum(-1) / left.sum(-1), 0)[:, None]  # (N, 1)
        for expert in range(dispatch.layer.num_experts):
            growth[dispatch.layer.index, expert] = factor[chosen(dispatch, expert).any(dim=-1)]

    def grown(layer: MoELayer, expert: int) -> Work:
        return lambda x: (layer.experts[expert](x) * growth[layer.index, expert]).to(x.dtype)

    with watch_dispatch(model, touched, note), ExitStack() as stack:
        for layer in touched:
            closed = overflow.of(layer.index)
            works = {e: torch.zeros_like if e in closed else grown(layer, e) for e in range(layer.num_experts)}
            stack.enter_context(layer.replace(works))
        yield


@contextmanager
def _deciding_again(model: nn.Module, layer: MoELayer, overflow: Overflow) -> Iterator[None]:
    """Inside the context, the layer's router decides again for tokens that find an expert closed."""
    closed: dict[str, Tensor] = {}

    def note(dispatch: Dispatch) -> None:
        closed["now"] = overflow.closed(dispatch)

    with (
        watch_dispatch(model, [layer], note, overflow.apart),
        layer.family.deciding_again(layer.module, lambda: closed["now"]),
    ):
        yield


What = Literal["dropped", "masked", "full", "limited"]
First = Literal["arrival", "weight"]


@dataclass(frozen=True)
class Overflow:
    """Experts, and when they are closed to a token.

    Attributes:
        experts: as (layer, expert).
        what: "dropped", they are not in the model any more, and the router does not know; "masked", they may not be
            used, and the router knows; "full", each takes at most ``capacity`` tokens of a sequence; "limited", a
            batch uses at most so many.
        capacity: real tokens of one sequence that an expert takes in one forward; only where experts are full.
        first: which tokens those are: the first to arrive, or those that it has the largest weights for, which a
            token later in the text can then push out.
        limit: which a batch closes; only where they are limited.
    """

    experts: Sequence[Name]
    what: What = "dropped"
    capacity: int | None = None
    first: First = "arrival"
    limit: Limit | None = None

    def __post_init__(self) -> None:
        if self.what not in get_args(What) or self.first not in get_args(First):
            raise LamellaError(
                f"what={self.what!r}, first={self.first!r}: an expert is one of {', '.join(get_args(What))}, and full "
                f"ones take tokens by {' or '.join(get_args(First))}."
            )
        if (self.what == "full") != (self.capacity is not None):
            raise LamellaError('capacity= says when an expert is full: give it with what="full", and only then.')
        if self.capacity is not None and self.capacity < 0:
            raise LamellaError(f"capacity={self.capacity} is not a number of tokens; give 0 or more.")
        if len(set(self.experts)) < len(self.experts):
            raise LamellaError("An expert is named twice among those that are closed; name each once.")

    def of(self, layer: int) -> list[int]:
        """The closed experts of a layer."""
        return [expert for index, expert in self.experts if index == layer]

    @property
    def waits(self) -> bool:
        """Whether it is what the router decides that says what is closed to a token."""
        return self.what in ("full", "limited")

    @property
    def apart(self) -> SequencesApart:
        """Refuses several sequences in a row, where it waits for what they are."""
        return COUNTED if self.limit is None else BATCHED

    def closed(self, dispatch: Dispatch) -> Tensor:
        """Which experts are closed to each token, ``(N, E)``; of those that are full only what it chose."""
        indices, routing = dispatch.routing.indices, dispatch.routing
        if self.limit is not None:
            decided = self.limit.closed(
                dispatch.layer.index, indices, routing.weights, dispatch.real, dispatch.shape
            )  # (tokens, E)
            return decided.repeat(dispatch.shape[0], 1)
        return torch.zeros_like(routing.logits, dtype=torch.bool).scatter_(1, indices, self.dropped(dispatch))

    def dropped(self, dispatch: Dispatch) -> Tensor:
        """Where a token finds an expert that it chose closed, ``(N, k)``; padding never does where experts are full."""
        if self.limit is not None:
            away = self.closed(dispatch).gather(1, dispatch.routing.indices)
            return away if dispatch.routing.kept is None else away & dispatch.routing.kept
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
