"""How a loss that belongs to a layer reaches the optimiser, whatever trainer, checkpointing or loss function is used.

Attachment: an autograd function on a tensor of the layer adds the gradient of the layer's own loss to the backward
pass. The loss needs no way out of the model, so it also reaches trainers that build their loss from logits, and a
checkpointed block that is recomputed attaches it anew. Its gradient is multiplied by the scale of the task loss, which
the call learns in the same backward pass (see ``lamella.routing.calls``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.routing.calls import RoutedCall
from lamella.routing.context import Frame

Gradient = Callable[..., Tensor]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, into: Tensor, gradient: Gradient, call: RoutedCall, *others: Tensor | None
    ) -> Tensor:
        ctx.gradient, ctx.call, ctx.others = gradient, call, len(others)
        ctx.save_for_backward(into, *others)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        added, scale = ctx.gradient(*ctx.saved_tensors), ctx.call.attached_scale()
        added.mul_(scale.to(added.device) if isinstance(scale, Tensor) else scale)
        return grad, added, None, None, *(None for _ in range(ctx.others))


def attach(
    carrier: Tensor,
    into: Tensor,
    loss: Callable[..., Tensor],
    gradient: Gradient,
    others: Sequence[Tensor | None],
    frame: Frame,
    name: str,
) -> Tensor:
    """Adds the gradient of a layer's own loss to the backward pass through ``carrier``, or hands the loss over.

    The gradient is computed in the backward pass, so that the forward pays nothing for it and keeps only tensors that
    are there anyway.

    Args:
        carrier: a tensor of the layer that the task loss depends on; returned with the same values.
        into: the tensor the loss is a function of.
        loss: the loss, a scalar with its coefficient, from ``into`` and ``others``; called where losses are collected.
        gradient: its gradient with respect to ``into``, from the same arguments.
        others: further tensors that both need.
        frame: the running call.
        name: the module the loss belongs to.
    """
    if frame.call.collected is None:
        attached: Tensor = _Attach.apply(carrier, into, gradient, frame.call, *others)
        return attached
    value = loss(into, *others)  # also when recomputing: a checkpoint must save the same tensors twice
    if not frame.recomputing:
        frame.call.losses.append((name, value))
    return carrier


def refuse_reentrant_collection(frame: Frame | None) -> None:
    """Raises where ``collect_losses`` would silently return losses without a gradient."""
    if frame is None or frame.call.collected is None:
        return
    if frame.checkpointed and not torch.is_grad_enabled():
        raise LamellaError(
            "collect_losses cannot see through reentrant gradient checkpointing: its losses would carry no gradient. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}, or leave the losses attached."
        )
