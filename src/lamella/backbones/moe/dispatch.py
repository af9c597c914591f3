"""Watching what the routers of a mixture-of-experts model give to their experts, while the model runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones.blocks import locate_stacks
from lamella.backbones.moe.family import NativeRouting
from lamella.backbones.moe.layer import MoELayer
from lamella.compiling import eagerly
from lamella.errors import LamellaError
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
def watch_dispatch(
    model: nn.Module,
    layers: Sequence[MoELayer],
    watcher: Callable[[Dispatch], None],
    apart: "SequencesApart | None" = None,
) -> Iterator[None]:
    """Inside the context, ``watcher`` is told of every layer's dispatch in every forward of the model.

    It is told once also under gradient checkpointing. Padding is known by the attention mask that the model is called
    with. A router that is called by hand, outside a forward of the model, is not watched. ``apart`` refuses rows that
    hold several sequences, where the watcher takes a row for one.
    """

    def told(dispatch: Dispatch) -> None:
        if apart is not None:
            apart.check(dispatch.layer, dispatch.x)
        watcher(dispatch)

    with tracked(model) if apart is None else apart.of(model), eagerly(), ExitStack() as watched:
        for layer in layers:
            watched.enter_context(layer.family.watched(layer.module, _telling(layer, told)))
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
    rows = _rows(x, frame)
    mask = frame.token_mask(rows, of_encoder=layer.place.reads_encoder)
    real = torch.ones(len(rows) * rows.shape[1], dtype=torch.bool, device=x.device) if mask is None else mask
    return real.to(x.device), (rows.shape[0], rows.shape[1])


class SequencesApart:
    """Refuses rows that hold several sequences, at the layers and where continuous batching is to begin.

    Args:
        why: what cannot be done with such rows.
    """

    def __init__(self, why: str) -> None:
        self.why = why

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Inside the context, continuous batching does not begin: it runs where no error is raised."""
        with tracked(model):
            tracker = find_tracker(model)
            assert tracker is not None
            tracker.listeners.append(self)
            try:
                yield
            finally:
                tracker.listeners.remove(self)

    def check(self, layer: MoELayer, x: Tensor) -> None:
        """Raises where several lie in a row of what a layer's experts are given, ``x`` as for ``real_tokens``."""
        frame = current_frame()
        if frame is not None and not layer.place.reads_encoder and frame.sequences(_rows(x, frame)).packed:
            raise LamellaError(f"Several documents are packed into a row: {self.why}. Give each a row of its own.")

    def asked(self, generation: Any, asked: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """``generate`` has a row for each sequence."""
        return arguments

    def batched(self, model: nn.Module) -> None:
        """Refuses."""
        raise LamellaError(f"Continuous batching packs sequences into a row: {self.why}. Use generate.")

    def opened(self, call: Any, arguments: Any) -> None:
        """What the rows hold is seen at the layers."""

    def closed(self, call: Any, output: Any) -> None:
        """Nothing is left."""


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


def _rows(x: Tensor, frame: Frame) -> Tensor:
    """Tokens by sequence, ``(batch, tokens, h)``."""
    batch = x.shape[0] if x.dim() == 3 else _batch_of(frame)
    return x.reshape(batch, -1, x.shape[-1])


def _batch_of(frame: Frame) -> int:
    """How many sequences a block's flattened tokens belong to."""
    given = frame.given if frame.mask is None else frame.mask
    return 1 if given is None else given.shape[0]
