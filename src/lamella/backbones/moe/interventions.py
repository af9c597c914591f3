"""Putting something else in the place of a module's method while a context is open, and restoring it exactly."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def put(module: nn.Module, method: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the context ``module.method`` is what ``make`` makes of it; contexts nest."""
    before = vars(module).get(method)  # what an outer context put there
    setattr(module, method, make(getattr(module, method)))
    try:
        yield
    finally:
        if before is None:
            delattr(module, method)
        else:
            setattr(module, method, before)


@contextmanager
def replace_experts(
    experts_module: nn.Module,
    chosen: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    experts: Mapping[int, Callable[[Tensor], Tensor]],
) -> Iterator[None]:
    """Inside the context, tokens of these experts go to these callables, ``(N, h) -> (N, h)``; weights stay.

    Args:
        experts_module: its forward takes the hidden states, what was selected, and the weights ``(N, k)``.
        chosen: indices ``(N, k)`` in what was selected, and where they were kept.
        experts: by index.
    """

    def make(original: Any) -> Any:
        def forward(hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
            indices, kept = chosen(selected)
            flat = hidden.reshape(-1, hidden.shape[-1])  # (N, h)
            places = {index: indices == index if kept is None else (indices == index) & kept for index in experts}
            replaced = torch.stack(list(places.values())).any(dim=0) if places else torch.zeros_like(weights).bool()
            output: Tensor = original(hidden, selected, weights.masked_fill(replaced, 0)).clone()
            add_experts(output.view(flat.shape), flat, weights, places, experts)
            return output

        return forward

    with put(experts_module, "forward", make):
        yield


def add_experts(
    output: Tensor,
    x: Tensor,
    weights: Tensor,
    places: Mapping[int, Tensor],
    experts: Mapping[int, Callable[[Tensor], Tensor]],
) -> None:
    """Adds into ``output (N, out)`` the weighted outputs of experts for their tokens in ``x (N, in)``.

    Args:
        output: changed in place.
        x: the tokens.
        weights: ``(N, k)``.
        places: where each expert was chosen, ``(N, k)``, by index.
        experts: by index.
    """
    for index, expert in experts.items():
        rows, slots = torch.where(places[index])
        if len(rows):
            added = expert(x[rows]) * weights[rows, slots, None]  # (rows, out)
            output.index_add_(0, rows, added.to(output.dtype))


# What a router's method puts out without some experts, from the method, those experts and the method's arguments.
Again = Callable[..., Any]


class _Restricted:
    """A router's method that decides without the masked experts."""

    def __init__(self, original: Any, again: Again, masked: frozenset[int]) -> None:
        # An outer restriction is taken in, so that the router decides once, without all of them.
        outer = original if isinstance(original, _Restricted) else None
        self.original: Any = original if outer is None else outer.original
        self.masked: frozenset[int] = masked if outer is None else masked | outer.masked
        self.again = again

    def __call__(self, *args: Any) -> Any:
        return self.again(self.original, self.masked, *args)


@contextmanager
def restrict_router(router: nn.Module, method: str, again: Again, masked: Collection[int]) -> Iterator[None]:
    """Inside the context, the router's method puts out what ``again`` makes of it without the masked experts."""
    with put(router, method, lambda original: _Restricted(original, again, frozenset(masked))):
        yield


def restricted(router: nn.Module, method: str) -> frozenset[int]:
    """The experts that are masked now."""
    present = vars(router).get(method)
    return present.masked if isinstance(present, _Restricted) else frozenset()
