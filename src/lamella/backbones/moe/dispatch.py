"""Watching what the routers of a mixture-of-experts model give to their experts, while the model runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamella.backbones.blocks import locate_stacks
from lamella.backbones.moe.family import NativeRouting
from lamella.backbones.moe.interventions import eagerly
from lamella.backbones.moe.layer import MoELayer
from lamella.routing import Frame, current_frame, find_tracker, track_calls, untrack_calls


@dataclass(frozen=True, eq=False)
class Dispatch:
    """What one layer gave to its experts in one forward.

    Attributes:
        layer: the layer.
        x: what the experts were given, ``(N, h)``, N = batch x tokens, row by row of the batch.
        routing: who got it, with which weight; N rows.
        real: which of the N are real tokens, ``(N,)``.
        shape: batch and tokens.
    """

    layer: MoELayer
    x: Tensor
    routing: NativeRouting
    real: Tensor
    shape: tuple[int, int]


@contextmanager
def watch_dispatch(model: nn.Module, layers: Sequence[MoELayer], watcher: Callable[[Dispatch], None]) -> Iterator[None]:
    """Inside the context, ``watcher`` is told of every layer's dispatch in every forward of the model.

    It is told once also under gradient checkpointing. Padding is known by the attention mask that the model is called
    with. A router that is called by hand, outside a forward of the model, is not watched.
    """
    with tracked(model), eagerly(), ExitStack() as watched:
        for layer in layers:
            watched.enter_context(layer.family.watched(layer.module, _telling(layer, watcher)))
        yield


@contextmanager
def tracked(model: nn.Module) -> Iterator[None]:
    """Inside the context, a layer's experts can know which of their tokens are real; see ``real_tokens``."""
    already = find_tracker(model) is not None
    if not already:
        track_calls(model, _models_of_stacks(model))
    try:
        yield
    finally:
        if not already:
            untrack_calls(model)


def real_tokens(layer: MoELayer, x: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
    """Which of the tokens ``x (N, h)`` or ``(batch, tokens, h)`` that a layer's experts are given are real.

    Returns:
        ``(N,)``, and batch and tokens; None outside a forward of a tracked model.
    """
    frame = current_frame()
    if frame is None:
        return None
    batch = x.shape[0] if x.dim() == 3 else _batch_of(frame)
    rows = x.reshape(batch, -1, x.shape[-1])
    mask = frame.token_mask(rows, of_encoder=layer.place.reads_encoder)
    real = torch.ones(len(rows) * rows.shape[1], dtype=torch.bool, device=x.device) if mask is None else mask
    return real.to(x.device), (batch, rows.shape[1])


def _models_of_stacks(model: nn.Module) -> list[nn.Module]:
    """The modules that are given the attention mask of a stack, other than the model itself."""
    owners = (model.get_submodule(stack.name.rpartition(".")[0]) for stack in locate_stacks(model))
    return [owner for owner in owners if owner is not model]


def _telling(layer: MoELayer, watcher: Callable[[Dispatch], None]) -> Callable[[Tensor, NativeRouting], None]:
    def tell(x: Tensor, routing: NativeRouting) -> None:
        frame = current_frame()
        known = real_tokens(layer, x)
        if frame is not None and known is not None and not frame.recomputing:
            watcher(Dispatch(layer, x.reshape(-1, x.shape[-1]), routing, *known))

    return tell


def _batch_of(frame: Frame) -> int:
    """How many sequences a block's flattened tokens belong to."""
    given = frame.given if frame.mask is None else frame.mask
    return 1 if given is None else given.shape[0]
