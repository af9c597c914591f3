"""Tensors of a model in each other's place, and back again bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

Pair = tuple[Tensor, Tensor]


@contextmanager
def exchanged_storages(pairs: Sequence[Pair]) -> Iterator[None]:
    """Inside the context the two tensors of each pair, which modules hold, have each other's data; nothing is copied.

    What training changes inside goes home with the data that it changed.
    """
    with ExitStack() as stack:
        for first, second in pairs:
            _exchange_storages(first, second)
            stack.callback(_exchange_storages, first, second)
        yield


@contextmanager
def exchanged_numbers(pairs: Sequence[Pair]) -> Iterator[None]:
    """The same by copying, for tensors that are views of what modules hold."""
    with ExitStack() as stack:
        for first, second in pairs:
            # made here, so that going back cannot run out of memory
            room = torch.empty_like(first, requires_grad=False)
            exchange = partial(_exchange_numbers, first, second, room)
            exchange()
            stack.callback(exchange)
        yield


@contextmanager
def overwritten(pairs: Sequence[Pair]) -> Iterator[None]:
    """Inside the context the first tensor of each pair holds a copy of the second's numbers.

    What training changes in that copy is lost on leaving.
    """
    with ExitStack() as stack:
        for first, second in pairs:
            kept = first.detach().clone()
            _write(first, second)
            stack.callback(_write, first, kept)
        yield


def _exchange_storages(first: Tensor, second: Tensor) -> None:
    first.data, second.data = second.data, first.data
    # autograd does not see this change: the backward of a forward before it has to fail, not to be wrong
    increment_version((first, second))


@torch.no_grad()
def _exchange_numbers(first: Tensor, second: Tensor, room: Tensor) -> None:
    room.copy_(first)
    first.copy_(second)
    second.copy_(room)


@torch.no_grad()
def _write(place: Tensor, numbers: Tensor) -> None:
    place.copy_(numbers)
