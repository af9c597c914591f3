"""How a loss that belongs to a layer reaches the optimiser, whatever trainer, checkpointing or loss function is used.

Attachment: an autograd function on a tensor of the layer adds the layer's own loss to the backward pass. The loss needs
no way out of the model, so it also reaches trainers that build their loss from logits, and a checkpointed block that is
recomputed attaches it anew. Its gradient is multiplied by the scale of the task loss, which the call learns in the same
backward pass (see ``lamella.routing.context``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.routing.context import Frame, RoutedCall


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, call: RoutedCall) -> Tensor:
        ctx.call = call
        ctx.loss_options = {"dtype": loss.dtype, "device": loss.device}
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.as_tensor(ctx.call.attached_scale(), **ctx.loss_options), None


@dataclass
class CollectedLoss:
    """The layers' own losses of the forwards inside ``collect_losses``, as differentiable scalars, by module name."""

    by_name: list[tuple[str, Tensor]] = field(default_factory=list)

    def total(self) -> Tensor:
        """Their sum, each already multiplied by its coefficient and its router's share of the block."""
        if not self.by_name:
            raise LamellaError(
                "No balance loss was collected: run a training-mode forward with gradients of a model whose config has "
                "balance_coef or z_coef above 0 inside `with collect_losses() as losses:`."
            )
        return torch.stack([loss for _, loss in self.by_name]).sum()


_COLLECTING: ContextVar[CollectedLoss | None] = ContextVar("lamella_collecting", default=None)


@contextmanager
def collect_losses() -> Iterator[CollectedLoss]:
    """Returns the layers' losses instead of attaching them, for a training loop that adds them itself."""
    collected = CollectedLoss()
    token = _COLLECTING.set(collected)
    try:
        yield collected
    finally:
        _COLLECTING.reset(token)


def attach(carrier: Tensor, loss: Tensor, frame: Frame, name: str) -> Tensor:
    """Adds ``loss`` to the backward pass through ``carrier``, or hands it to ``collect_losses``.

    Args:
        carrier: a tensor of the layer that the task loss depends on; returned with the same values.
        loss: a scalar, already multiplied by its coefficient.
        frame: the running call.
        name: the module the loss belongs to.

    Raises:
        LamellaError: losses are collected inside a reentrant checkpoint, where they would carry no gradient.
    """
    collected = _COLLECTING.get()
    if collected is None:
        attached: Tensor = _Attach.apply(carrier, loss, frame.call)
        return attached
    if not frame.recomputing:
        collected.by_name.append((name, loss))
    return carrier


def refuse_reentrant_collection(frame: Frame | None) -> None:
    """Raises where ``collect_losses`` would silently return losses without a gradient."""
    inside_reentrant = frame is not None and frame.checkpointed and not torch.is_grad_enabled()
    if _COLLECTING.get() is not None and inside_reentrant:
        raise LamellaError(
            "collect_losses cannot see through reentrant gradient checkpointing: its losses would carry no gradient. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}, or leave the losses attached."
        )
