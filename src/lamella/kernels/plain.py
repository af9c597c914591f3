"""The rank-space form where the frozen layer is nothing but ``W x + b``: layer and LoRAs as one step of autograd.

Beside ``base(x)`` and ``mix_frozen`` it saves a second gradient of x, as large as x, and the sum of the two.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella.kernels.frozen import FrozenLoras, group_rows, scale_columns, sum_per_lora, sum_rows


class _MixPlain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, loras: FrozenLoras
    ) -> Tensor:
        h = x @ loras.A.t()  # (S, T, R)
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, weights, weight, loras.A, loras.B)
        ctx.ranks = loras.ranks
        y = torch.nn.functional.linear(x, weight, bias)  # (S, T, out)
        y.flatten(0, 1).addmm_(scale_columns(h, weights, loras.ranks).flatten(0, 1), loras.B.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, weight, A, B = ctx.saved_tensors
        grad_scaled = grad @ B  # (S, T, R)
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight  # (S, T, in)
            grad_x.flatten(0, 1).addmm_(scale_columns(grad_scaled, weights, ctx.ranks).flatten(0, 1), A)
        if h is not None:
            grad_weights = sum_per_lora(sum_rows(grad_scaled.mul_(h)), ctx.ranks).to(weights.dtype)  # (S, K)
        return grad_x, grad_weights, None, None, None


def mix_plain(x: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, loras: FrozenLoras) -> Tensor:
    """``W x + b + sum_i G_i s_i B_i A_i x`` through the rank space.

    Args:
        x: ``(*rows, in)``.
        weights: G, ``(*some, K)`` with ``some`` a leading part of ``rows``.
        weight: the frozen layer's own matrix, ``(out, in)``; a transposed view for a layer that keeps it as
            ``(in, out)``. Gets no gradient.
        bias: ``(out,)`` or None. Gets no gradient.
        loras: of this layer.

    Returns:
        ``(*rows, out)``.
    """
    grouped, by_group = group_rows(x, weights)  # (S, T, in), (S, K)
    y: Tensor = _MixPlain.apply(grouped, by_group, weight, bias, loras)
    return y.view(*x.shape[:-1], len(weight))
