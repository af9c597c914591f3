"""One part of a model in another's place, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lamella.errors import LamellaError
from lamella.similarity.swapping.units import Named, Part, Unit, find_part, pair_tensors

Aligner = Callable[[Tensor], Tensor]
# one for the one way; for both ways a pair (before b for a's tokens, before a for b's), or by (source, target)
Aligners = Aligner | tuple[Aligner, Aligner] | Mapping[tuple[Named, Named], Aligner]


@contextmanager
def swap(
    model: nn.Module,
    a: Named,
    b: Named,
    unit: Unit = "expert",
    exchange: bool = True,
    aligner: Aligners | None = None,
) -> Iterator[None]:
    """Inside the context ``a`` and ``b`` work in each other's place; leaving restores the model bit for bit.

    Weights change places, modules stay: what is not a weight (the block's place in the cache, its kind of attention,
    top-k, capacity) stays with the place. "router+experts" leaves shared experts where they are; "block" takes all
    there is in the block, attention and norms too. Contexts may be nested. A backward belongs in the context of its
    forward. What training changes inside goes home with the weights that it changed; one-way, what it changes in the
    first's place is lost. Weights tied to others are refused, except between the two layers themselves.

    Args:
        model: a model with a mixture of experts, also in a PeftModel.
        a: the first, (layer, expert), or for other units a layer; layer = index of the block, an encoder's first.
        b: the second.
        unit: what changes places.
        exchange: both take the other's place; otherwise the second takes the first's and keeps its own.
        aligner: what a token passes before it is given to a strange expert, ``(N, h) -> (N, h)``: one callable where
            only the second takes the first's place; for an exchange a pair of them, the one in ``a``'s place first, or
            a mapping by (source, target), the source being the one whose place is taken.

    Raises:
        LamellaError: no such layer or expert, the two are built differently, tied weights, an aligner before a unit
            that is not an expert, one aligner for an exchange.
    """
    first, second = find_part(model, unit, a), find_part(model, unit, b)
    with _swapped(model, first, second, exchange, aligner):
        yield


@contextmanager
def randomised(model: nn.Module, a: Named, unit: Unit = "expert", seed: int = 0) -> Iterator[None]:
    """Inside the context ``a`` has random weights: each tensor is normal with its own mean and standard deviation.

    What a replacement costs that knows nothing: the upper control of a swap. Leaving restores the model bit for bit.

    Raises:
        LamellaError: no such layer or expert.
    """
    part = find_part(model, unit, a)
    state = np.random.SeedSequence((seed, part.layer, part.expert + 1)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    weights = [one for one in part.tensors.values() if unit == "expert" or isinstance(one, nn.Parameter)]
    with overwritten([(weight, _alike(weight, generator)) for weight in weights]):
        yield


def _swapped(
    model: nn.Module, first: Part, second: Part, exchange: bool, aligner: Aligners | None
) -> AbstractContextManager[None]:
    if aligner is not None:
        return _aligned(first, second, exchange, aligner)
    pairs = pair_tensors(model, first, second)
    if not exchange:
        return overwritten(pairs)
    return exchanged_numbers(pairs) if first.unit == "expert" else exchanged_storages(pairs)


@contextmanager
def _aligned(first: Part, second: Part, exchange: bool, aligner: Aligners) -> Iterator[None]:
    """Strange experts behind aligners; the weights stay where they are."""
    if first.unit != "expert":
        raise LamellaError(f"An aligner stands before an expert, and {first} is none; swap with unit='expert'.")
    with ExitStack() as stack:
        for source, target in [(first, second), (second, first)] if exchange else [(first, second)]:
            assert source.moe is not None
            before = _aligner_of(aligner, source, target, exchange, at=0 if source is first else 1)
            strange = _behind(before, target)
            stack.enter_context(source.moe.replace({source.expert: strange}))
        yield


def _aligner_of(aligner: Aligners, source: Part, target: Part, exchange: bool, at: int) -> Aligner:
    if isinstance(aligner, Mapping):
        key = (source.layer, source.expert), (target.layer, target.expert)
        if key not in aligner:
            raise LamellaError(f"There is no aligner for {key[0]} in the place of which {key[1]} works; give one.")
        return aligner[key]
    if isinstance(aligner, tuple):
        if len(aligner) != 2:
            raise LamellaError(f"{len(aligner)} aligners were given for the swap of two experts; give a pair.")
        return aligner[at]
    if exchange:
        raise LamellaError(
            f"One aligner cannot serve both directions between {source} and {target}; give a pair of them, or "
            "exchange=False."
        )
    return aligner


def _behind(aligner: Aligner, target: Part) -> Aligner:
    """An expert given what the aligner, in its own precision, makes of a token."""
    assert target.moe is not None
    experts = target.moe.experts
    parameter = next(aligner.parameters(), None) if isinstance(aligner, nn.Module) else None

    def strange(x: Tensor) -> Tensor:
        aligned = aligner(x if parameter is None else x.to(parameter.dtype)).to(x.dtype)  # (N, h)
        return experts[target.expert](aligned)  # asked for now: another swap may have been entered since

    return strange


def _alike(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the mean and the standard deviation of these."""
    numbers = tensor.detach().double()
    noise = torch.randn(tensor.shape, generator=generator).to(numbers)
    return (numbers.mean() + numbers.std(correction=0) * noise).to(tensor.dtype)


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
            first_values = first.detach().clone()
            _write(first, second)
            stack.callback(_write, first, first_values)
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
