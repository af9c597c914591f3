"""The dense form: all experts at once, as one wide LoRA whose rank space is weighted per token.

Two GEMMs whatever E is. Kept for the backward pass are only x, h and the weights: what a plain LoRA keeps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Project(torch.autograd.Function):
    """``x [F_1; F_2; ...]^T`` in one GEMM; the concatenation is made anew in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        return x @ torch.cat(factors).t()  # (N, J)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grad_x = grad @ torch.cat(factors) if ctx.needs_input_grad[0] else None  # (N, in)
        if not any(ctx.needs_input_grad[1:]):
            return grad_x, *(None for _ in factors)
        grad_factors = (grad.t() @ x).split([len(factor) for factor in factors])  # each (rows, in)
        return grad_x, *grad_factors


def project(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Several linear maps of the same input in one GEMM.

    Args:
        x: ``(N, in)``.
        factors: maps without bias, each ``(rows_j, in)``: stacked A of the experts, a router's weight, ...

    Returns:
        ``x @ factor.T`` for each factor, ``(N, rows_j)``: views of one product.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        if len(factors) == 1:
            return [torch.nn.functional.linear(x, factors[0])]
        product = torch.nn.functional.linear(x, torch.cat([*factors]))  # (N, J)
    else:
        product = _Project.apply(x, *factors)
    return list(product.split([len(factor) for factor in factors], dim=-1))


class _MixDense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, weights: Tensor | None, B: Tensor, scaling: float, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(h, weights, B)
        ctx.scaling = scaling
        return _add(y, h, weights, B, scaling, in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, B = ctx.saved_tensors
        num_experts, _, r = B.shape
        up = _up(B)  # (E*r, out)
        grad_scaled = (grad @ up.t()).mul_(ctx.scaling)  # (N, E*r)
        grad_weights = None
        if ctx.needs_input_grad[2]:
            by_expert = grad_scaled.unflatten(-1, (-1, r)) * h.unflatten(-1, (-1, r))  # (N, E, r)
            grad_weights = by_expert.sum(dim=-1).to(weights.dtype)  # (N, E)
        grad_B = None
        if ctx.needs_input_grad[3]:
            grad_up = (_scale_columns(h, weights, r).t() @ grad).mul_(ctx.scaling)  # (E*r, out)
            grad_B = grad_up.view(num_experts, r, -1).transpose(1, 2)  # (E, out, r)
        grad_h = _scale_columns(grad_scaled, weights, r)  # (N, E*r)
        if h.shape[1] < grad_h.shape[1]:  # all read the same A
            grad_h = grad_h.unflatten(-1, (-1, r)).sum(dim=1)  # (N, r)
        return grad, grad_h, grad_weights, grad_B, None, None


def mix_dense(
    y: Tensor, h: Tensor, weights: Tensor | None, B: Tensor, scaling: float, in_place: bool = False
) -> Tensor:
    """``y + scaling * sum_e weights_e B_e h_e`` from the experts' rank space.

    Args:
        y: output of the frozen layer, ``(N, out)``.
        h: ``A_e x`` of all experts side by side, ``(N, E*r)``; ``A x``, ``(N, r)``, where all share one A.
        weights: a weight per token and expert, zero where an expert is not used, ``(N, E)``; None is weight one.
        B: up projections, ``(E, out, r)``.
        scaling: LoRA's ``lora_alpha / r``.
        in_place: add into ``y``, which then must be nobody else's: no saved output, no reference kept.

    Returns:
        ``(N, out)``; in the memory of ``y`` where ``in_place``.
    """
    # A compiler derives a backward pass itself, and decides what it keeps for it.
    mix = _MixDense.apply if torch.is_grad_enabled() and not torch.compiler.is_compiling() else _add
    mixed: Tensor = mix(y, h, weights, B, scaling, in_place)
    return mixed


def _add(y: Tensor, h: Tensor, weights: Tensor | None, B: Tensor, scaling: float, in_place: bool) -> Tensor:
    return target(y, in_place).addmm_(_scale_columns(h, weights, B.shape[2]), _up(B), alpha=scaling)  # (N, out)


def target(y: Tensor, in_place: bool) -> Tensor:
    """What a form adds into: y's own memory where nobody else can hold it, otherwise a copy.

    Not y itself: a linear layer's output is a view, and marking a view as changed in place makes autograd copy the
    whole gradient once more. ``data`` is the same memory without that history.
    """
    return y.data if in_place else y.clone()


def _scale_columns(h: Tensor, weights: Tensor | None, r: int) -> Tensor:
    """Each expert's r columns of ``h (N, E*r)``, or the same ``(N, r)``, times its weight ``(N, E)``: ``(N, E*r)``."""
    if weights is None:
        return h
    return (h.unflatten(-1, (-1, r)) * weights.to(h.dtype)[..., None]).flatten(1)


def _up(B: Tensor) -> Tensor:
    """The experts' up projections below each other: ``(E, out, r) -> (E*r, out)``."""
    return B.transpose(1, 2).reshape(-1, B.shape[1])
