"""The merged form: where one weight serves many rows, the LoRAs are put into the layer's matrix and x passes once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella.kernels.frozen import FrozenLoras, group_rows, mix_frozen, scale_columns, sum_per_lora, sum_rows
from lamella.kernels.plain import mix_plain

# What an operation of the merge costs, in units of one that it saves. Measured on CPU with 8 and 32 LoRAs of rank 8: at
# d/2 rows the forms cost the same in training (0.96 to 1.02 at width 768, 1.00 to 1.04 at 2048) and merging 3 to 9 %
# more in inference; at 2/3 d merging is cheaper in both.
_MERGE_COST = 1.15


def prefers_merged(rows_per_weight: int, in_features: int, out_features: int) -> bool:
    """Whether one matrix for a group of rows costs less than passing each row through the rank space.

    Merging takes ``2 R in out`` operations for a group; what it saves takes ``2 R (in + out)`` for each row of it,
    forwards, and as much again backwards less the gradient of the weights. So R, and with it K, cancels:
    ``rows > in out / (in + out)``, d/2 for a square matrix.
    """
    return rows_per_weight * (in_features + out_features) > _MERGE_COST * in_features * out_features


class _MixMerged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        weights: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loras: FrozenLoras,
    ) -> Tensor:
        merged = merge(weights, weight, loras)  # (S, out, in)
        ctx.save_for_backward(
            merged if ctx.needs_input_grad[0] else None,
            h if ctx.needs_input_grad[2] else None,
            loras.B if ctx.needs_input_grad[2] else None,
        )
        ctx.ranks, ctx.dtype = loras.ranks, weights.dtype
        if len(merged) == 1:
            return torch.nn.functional.linear(x, merged[0], bias)
        y = torch.bmm(x, merged.transpose(1, 2))  # (S, T, out)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        merged, h, B = ctx.saved_tensors
        grad_x = grad_weights = None
        if merged is not None:
            grad_x = grad @ merged[0] if len(merged) == 1 else torch.bmm(grad, merged)  # (S, T, in)
        if B is not None:
            grad_weights = sum_per_lora(sum_rows((grad @ B).mul_(h)), ctx.ranks).to(ctx.dtype)  # (S, K)
        return grad_x, None, grad_weights, None, None, None


def mix_merged(x: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, loras: FrozenLoras) -> Tensor:
    """``(W + B diag(G) A) x + b``, where G is the same for all rows of a group.

    The gradient of x goes through the merged matrix, which is kept for it (``out * in`` numbers for each group,
    whatever K is); that of G_i is the sum over i's columns of the column sums of ``(x A^T) * (dy B)``, for which
    ``h = A x`` is kept, not x.

    Args:
        x: ``(*rows, in)``.
        weights: G, ``(*some, K)`` with ``some`` a leading part of ``rows``: ``(K,)`` or ``(batch, K)``.
        weight: the frozen layer's own matrix, ``(out, in)``; a transposed view for a layer that keeps it as
            ``(in, out)``. Gets no gradient.
        bias: ``(out,)`` or None. Gets no gradient.
        loras: of this layer.

    Returns:
        ``(*rows, out)``.
    """
    grouped, by_group = group_rows(x, weights)  # (S, T, in), (S, K)
    # As a constant: through the merged matrix x already gets the whole of its gradient.
    h = grouped.detach() @ loras.A.t() if weights.requires_grad and torch.is_grad_enabled() else None  # (S, T, R)
    y: Tensor = _MixMerged.apply(grouped, h, by_group, weight, bias, loras)
    return y.view(*x.shape[:-1], len(weight))


def merge(weights: Tensor, weight: Tensor, loras: FrozenLoras) -> Tensor:
    """``W + B diag(G) A`` for each row of ``weights (S, K)``: ``(S, out, in)``."""
    if len(weights) == 1:
        return torch.addmm(weight, scale_columns(loras.B[None], weights, loras.ranks)[0], loras.A)[None]
    up = scale_columns(loras.B.expand(len(weights), -1, -1), weights, loras.ranks)  # (S, out, R)
    return torch.baddbmm(weight[None], up, loras.A.expand(len(weights), -1, -1))


def forward_frozen(
    base: Callable[[Tensor], Tensor],
    plain: tuple[Tensor, Tensor | None] | None,
    x: Tensor,
    weights: Tensor,
    loras: FrozenLoras,
    h: Tensor | None = None,
) -> Tensor:
    """A frozen layer with its weighted LoRAs, in the cheapest form.

    Args:
        base: the frozen layer.
        plain: its matrix ``(out, in)`` (a transposed view where it keeps ``(in, out)``, as Conv1D does) and its bias,
            where the layer is nothing but ``W x + b`` and nobody hooks into it; None for any other layer, such as a
            quantised one, which is called as it is.
        x: ``(*rows, in)``.
        weights: G, ``(*some, K)`` with ``some`` a leading part of ``rows``.
        loras: of this layer. They compute in autocast's precision where it is on, otherwise in their own.
        h: ``x A^T`` where the caller has it already, ``(*rows, R)``.

    Returns:
        ``(*rows, out)`` in the precision of the base layer's output.
    """
    kind = x.device.type
    lowered = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if plain is not None and h is None:
        weight, bias = plain
        dtype = lowered or weight.dtype
        rows_per_weight = x.shape[weights.dim() - 1 : -1].numel()
        merges = prefers_merged(rows_per_weight, *weight.shape)
        if merges or dtype == (lowered or loras.A.dtype):  # LoRAs wider than the layer are added in their own precision
            mix = mix_merged if merges else mix_plain
            bias = None if bias is None else bias.to(dtype)
            return mix(x.to(dtype), weights, weight.to(dtype), bias, loras.to(dtype))
    y = base(x)
    dtype = lowered or loras.A.dtype
    if h is None:
        h = x.to(dtype) @ loras.A.to(dtype).t()  # (*rows, R); A is frozen, so that autograd keeps no x
    in_place = plain is not None and y.dtype == dtype
    return mix_frozen(y.to(dtype), h.to(dtype), weights, loras.B.to(dtype), loras.ranks, in_place).to(y.dtype)
