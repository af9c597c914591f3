"""How a loss that belongs to a layer reaches the optimiser, whatever trainer, checkpointing or loss function is used.

Attachment: an autograd function on a tensor of the layer adds the gradient of the layer's own loss to the backward
pass. The loss needs no way out of the model, so it also reaches trainers that build their loss from logits, and a
checkpointed block that is recomputed attaches it anew. Its gradient is multiplied by the scale of the task loss, which
the call learns in the same backward pass (see ``lamella.routing.calls``).

A compiled call cannot learn anything while its backward pass runs. It collects the losses and joins their sum to its
outputs where it ends, so that the gradient of the loss brings the scale along.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lamella.compiling import between_graphs
from lamella.errors import LamellaError
from lamella.routing.calls import RoutedCall
from lamella.routing.context import Frame

Gradient = Callable[..., Tensor]


_between_graphs = between_graphs("the scale of the task loss is known in the backward pass")


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


@_between_graphs
def _attach(carrier: Tensor, into: Tensor, gradient: Gradient, call: RoutedCall, *others: Tensor | None) -> Tensor:
    attached: Tensor = _Attach.apply(carrier, into, gradient, call, *others)
    return attached


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
        return _attach(carrier, into, gradient, frame.call, *others)
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


class _RecordScale(torch.autograd.Function):
    """The identity on the model's loss; its backward tells the call how the loss is scaled."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, call: RoutedCall) -> Tensor:
        ctx.call = call
        return loss.clone()  # not a view: trainers multiply the loss in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call.recorded_scale = grad.detach()
        return grad, None


def record_loss_scale(output: Any, call: RoutedCall) -> Any:
    """What a model puts out, with a loss that tells the call in the backward pass how it is scaled."""
    loss = _loss_in(output)
    return output if loss is None else _with_loss(output, _record(loss, call))


@_between_graphs
def _record(loss: Tensor, call: RoutedCall) -> Tensor:
    recorded: Tensor = _RecordScale.apply(loss, call)
    return recorded


class _JoinOutputs(torch.autograd.Function):
    """The identity on a model's outputs; its backward gives what was collected the scale of the task loss."""

    @staticmethod
    def forward(ctx: Any, call: RoutedCall, collected: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.like = call, collected
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = torch.as_tensor(ctx.call.attached_scale()).to(ctx.like)
        return None, scale, *grads


def join(call: RoutedCall, output: Any) -> Any:
    """What a model puts out, with the losses that the call has collected: the same values, and their gradient.

    They are joined to the loss, where the model returns one, otherwise to all its outputs that have a gradient.
    """
    assert call.collected is not None
    collected, loss = call.collected.total(), _loss_in(output)
    if loss is None:
        return _join_outputs(call, collected, output)
    nothing = (call.label_share * (collected - collected.detach())).to(loss)
    return _with_loss(output, loss + nothing)


@_between_graphs
def _join_outputs(call: RoutedCall, collected: Tensor, output: Any) -> Any:
    call.trainers_scale = call.tracker.trainers_scale(call.tracker.shifts_labels)
    leaves, structure = tree_flatten(output, is_leaf=lambda node: not isinstance(node, Mapping | tuple | list))
    carriers = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    for n, joined in zip(carriers, _JoinOutputs.apply(call, collected, *(leaves[n] for n in carriers)), strict=True):
        leaves[n] = joined
    return tree_unflatten(leaves, structure)


def _loss_in(output: Any) -> Tensor | None:
    """The loss that a model returns; None where there is none to train by."""
    if isinstance(output, MutableMapping):
        loss = output.get("loss")
    else:
        loss = output[0] if isinstance(output, tuple) and output else None
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, MutableMapping):
        output["loss"] = loss
        return output
    return (loss, *output[1:])
