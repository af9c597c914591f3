"""Putting something else in the place of a module's method while a context is open, and restoring it exactly."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lamella.compiling import eagerly


@contextmanager
def put(module: nn.Module, method: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the context ``module.method`` is what ``make`` makes of it; contexts nest."""
    before = vars(module).get(method)  # what an outer context put there
    setattr(module, method, make(getattr(module, method)))
    try:
        with eagerly():
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
    """A router's method that decides without the experts that are masked when it is called."""

    def __init__(self, original: Any, again: Again) -> None:
        self.original, self.again = original, again
        self.masks: list[frozenset[int]] = []  # of each open context

    @property
    def masked(self) -> frozenset[int]:
        return frozenset().union(*self.masks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.again(self.original, self.masked, *args, **kwargs)


_RESTRICTED: WeakKeyDictionary[nn.Module, _Restricted] = WeakKeyDictionary()


@contextmanager
def restrict_router(router: nn.Module, method: str, again: Again, masked: Collection[int]) -> Iterator[None]:
    """Inside the context, the router's method puts out what ``again`` makes of it without the masked experts.

    Where contexts are nested, it is asked once, without all that are masked.
    """
    with ExitStack() as stack:
        if router not in _RESTRICTED:

            def make(original: Any) -> _Restricted:
                _RESTRICTED[router] = _Restricted(original, again)
                return _RESTRICTED[router]

            stack.enter_context(put(router, method, make))
            stack.callback(_RESTRICTED.pop, router)
        masks = _RESTRICTED[router].masks
        masks.append(frozenset(masked))
        stack.callback(masks.pop)
        yield


def restricted(router: nn.Module) -> frozenset[int]:
    """The experts that are masked now."""
    return _RESTRICTED[router].masked if router in _RESTRICTED else frozenset()
