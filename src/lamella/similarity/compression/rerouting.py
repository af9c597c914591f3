"""Tokens whose expert is closed to them: to the most similar expert, to none, or to the router's next choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones.moe import Dispatch, MoELayer, watch_dispatch
from lamella.errors import LamellaError
from lamella.similarity.compression.closing import Closing, First, What, chosen
from lamella.similarity.compression.layers import find_experts, native_layers
from lamella.similarity.compression.routes import Route
from lamella.similarity.screening.pairs import Name

Work = Callable[[Tensor], Tensor]


@contextmanager
def reroute(
    model: nn.Module,
    experts: Sequence[Name],
    routes: Mapping[Name, Route],
    what: What = "dropped",
    *,
    capacity: int | None = None,
    first: First = "arrival",
) -> Iterator[None]:
    """Inside the context, a token that finds its expert closed goes to that expert's route, with the router's weight.

    The route's expert works for it even if the token chose that one too (it then counts with both weights) and even if
    it is full itself. Leaving restores the model bit for bit.

    Args:
        model: one that came with its experts.
        experts: as (layer, expert).
        routes: for each of them, taken as they are; see ``find_routes``.
        what: "dropped" and "masked" send away every token, "full" those beyond ``capacity``.
        capacity: real tokens of one sequence that each of the experts takes in one forward.
        first: which tokens a full expert takes: the first to "arrive", or those of largest "weight".

    Raises:
        LamellaError: an expert without route, an expert that the model does not have, or a capacity that does not
            belong to ``what``.
    """
    closing = Closing(experts, what, capacity, first)
    layers = _closable(model, closing)
    if missing := [name for name in experts if name not in routes]:
        raise LamellaError(
            f"Expert {missing[0][1]} of layer {missing[0][0]} has no route; find_routes finds one for each."
        )
    works = {name: routes[name].work(layers) for name in experts}
    with _elsewhere(model, layers, closing, works):
        yield


@contextmanager
def drop(
    model: nn.Module,
    experts: Sequence[Name],
    what: What = "dropped",
    *,
    capacity: int | None = None,
    first: First = "arrival",
) -> Iterator[None]:
    """Inside the context, a token gets nothing from an expert that is closed to it.

    "dropped" and "full": the weights of the token's other experts stay. "masked": they grow in proportion to what all
    of its weights summed to; a token whose experts are all masked gets nothing. Arguments and errors as ``reroute``.
    """
    closing = Closing(experts, what, capacity, first)
    layers = _closable(model, closing)
    if what == "masked":
        with _without(model, layers, closing):
            yield
    else:
        with _elsewhere(model, layers, closing, dict.fromkeys(experts, torch.zeros_like)):
            yield


@contextmanager
def next_choice(
    model: nn.Module,
    experts: Sequence[Name],
    what: What = "dropped",
    *,
    capacity: int | None = None,
    first: First = "arrival",
) -> Iterator[None]:
    """Inside the context, the router decides again for a token that finds experts closed, without those.

    So its next choice takes the place, with the weights that the router then gives; a next choice that is full too
    takes it all the same. Arguments and errors as ``reroute``, and an error where fewer experts are left than each
    token gets.
    """
    closing = Closing(experts, what, capacity, first)
    layers = _closable(model, closing)
    with ExitStack() as stack:
        for layer in layers.values():
            if closed := closing.of(layer.index):
                if layer.num_experts - len(closed) < layer.top_k:
                    raise LamellaError(
                        f"{len(closed)} closed experts of the {layer.num_experts} of layer {layer.index} leave fewer "
                        f"than the {layer.top_k} that each token gets; close fewer."
                    )
                stack.enter_context(layer.mask(closed) if what != "full" else _deciding_again(model, layer, closing))
        yield


def _closable(model: nn.Module, closing: Closing) -> dict[int, MoELayer]:
    """The layers by index, if they have the experts."""
    layers = native_layers(model)
    find_experts(layers, closing.experts)
    return layers


@contextmanager
def _elsewhere(
    model: nn.Module, layers: Mapping[int, MoELayer], closing: Closing, works: Mapping[Name, Work]
) -> Iterator[None]:
    """Inside the context, tokens that are turned away from an expert go to its work, the others to the expert."""
    touched = [layer for index, layer in layers.items() if closing.of(index)]
    away: dict[Name, Tensor] = {}  # of the tokens that chose the expert in this forward, in their order

    def note(dispatch: Dispatch) -> None:
        turned = closing.turned_away(dispatch)
        for expert in closing.of(dispatch.layer.index):
            here = chosen(dispatch, expert)
            away[dispatch.layer.index, expert] = (turned & here).any(dim=-1)[here.any(dim=-1)]

    def shared(layer: MoELayer, expert: int) -> Work:
        name = (layer.index, expert)

        def work(x: Tensor) -> Tensor:
            output = torch.empty_like(x)
            output[~away[name]] = layer.experts[expert](x[~away[name]])
            output[away[name]] = works[name](x[away[name]]).to(output.dtype)
            return output

        return work

    with ExitStack() as stack:
        if closing.capacity is not None:
            stack.enter_context(watch_dispatch(model, touched, note))
        for layer in touched:
            closed = closing.of(layer.index)
            own = {e: works[layer.index, e] if closing.capacity is None else shared(layer, e) for e in closed}
            stack.enter_context(layer.replace(own))
        yield


@contextmanager
def _without(model: nn.Module, layers: Mapping[int, MoELayer], closing: Closing) -> Iterator[None]:
    """Inside the context, closed experts give nothing and the others of a token as much more, in proportion."""
    touched = [layer for index, layer in layers.items() if closing.of(index)]
    growth: dict[Name, Tensor] = {}  # of the tokens that chose an open expert, in their order, (n, 1)

    def note(dispatch: Dispatch) -> None:
        weights = dispatch.routing.weights  # (N, k)
        left = weights.masked_fill(closing.turned_away(dispatch), 0)
        factor = torch.where(left.sum(-1) > 0, weights.sum(-1) / left.sum(-1), 0)[:, None]  # (N, 1)
        for expert in range(dispatch.layer.num_experts):
            growth[dispatch.layer.index, expert] = factor[chosen(dispatch, expert).any(dim=-1)]

    def grown(layer: MoELayer, expert: int) -> Work:
        return lambda x: (layer.experts[expert](x) * growth[layer.index, expert]).to(x.dtype)

    with watch_dispatch(model, touched, note), ExitStack() as stack:
        for layer in touched:
            closed = closing.of(layer.index)
            works = {e: torch.zeros_like if e in closed else grown(layer, e) for e in range(layer.num_experts)}
            stack.enter_context(layer.replace(works))
        yield


@contextmanager
def _deciding_again(model: nn.Module, layer: MoELayer, closing: Closing) -> Iterator[None]:
    """Inside the context, the layer's router decides again for tokens that find an expert full."""
    closed: dict[str, Tensor] = {}

    def note(dispatch: Dispatch) -> None:
        away = closing.turned_away(dispatch)
        full = torch.zeros_like(dispatch.routing.logits, dtype=torch.bool)  # (N, E)
        closed["full"] = full.scatter_(1, dispatch.routing.indices, away)

    def decide(router: nn.Module, args: Any, output: Any) -> Any:
        logits = output[layer.family.logits_at]
        decided = layer.family.decide(router, logits.masked_fill(closed["full"].view_as(logits), -torch.inf))
        return tuple(new.to(old.dtype) for new, old in zip(decided, output, strict=True))

    with watch_dispatch(model, [layer], note):
        handle = layer.router_module.register_forward_hook(decide)
        try:
            yield
        finally:
            handle.remove()
