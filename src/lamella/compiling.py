"""``torch.compile``: what it is not to trace, the model inside a compiled one, and that model's own code."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Function = TypeVar("Function", bound=Callable[..., Any])


def between_graphs(reason: str) -> Callable[[Function], Function]:
    """Decorates what cannot be traced: compiled code ends one graph, calls it, and begins another."""
    decorate: Callable[[Function], Function] = torch.compiler.disable(reason=reason)
    return decorate


def known_when_traced(function: Function) -> Function:
    """Decorates what puts out the same at every call with the same arguments, so that it is asked while tracing."""
    constant: Function = torch.compiler.assume_constant_result(function)
    return constant


class _Open:
    """How many contexts ask for models' own code; torch has one stance for all threads, which end in any order."""

    def __init__(self) -> None:
        self.count, self.lock, self.stance = 0, Lock(), ExitStack()


_OPEN = _Open()


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside the context, a compiled model runs its own code, as compiled code does not see what is set on modules."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled yet
        yield
        return
    with _OPEN.lock:
        if _OPEN.count == 0:
            _OPEN.stance.enter_context(torch.compiler.set_stance("force_eager"))
        _OPEN.count += 1
    try:
        yield
    finally:
        with _OPEN.lock:
            _OPEN.count -= 1
            if _OPEN.count == 0:
                _OPEN.stance.close()


def uncompiled(model: Model) -> Model:
    """The model itself, where ``torch.compile`` has put a module of its own around it."""
    inside: Any = model._modules.get("_orig_mod")
    return model if inside is None else inside
