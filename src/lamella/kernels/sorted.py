"""The sorted form: each expert sees only the tokens that chose it, gathered by expert.

For many experts. Work is proportional to k, not E. Kept for the backward pass are x, the weights and the order; every
gathered row is gathered again.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella.kernels.dense import target

Form = Literal["dense", "sorted"]

# Measured on CPU (`python -m benchmarks forms`): the dense form computes all E experts in two skinny GEMMs, the sorted
# form only the k chosen ones in 2 E smaller ones; they cross where the experts' ranks together pass 165 (width 768) to
# 185 (width 2048) columns.
SORTED_ABOVE = 160


def choose_form(num_experts: int, r: int, top_k: int) -> Form:
    """The faster form for E experts of rank r with k used per token."""
    return "sorted" if num_experts * r > SORTED_ABOVE and 2 * top_k <= num_experts else "dense"


class _MixSorted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        order = indices.flatten().argsort(stable=True)  # (N*k,), slots of (N, k) by expert
        counts = torch.bincount(indices.flatten(), minlength=len(A)).tolist()
        ctx.save_for_backward(x, weights, order, A, B)
        ctx.counts, ctx.scaling = counts, scaling
        mixed = target(y, in_place)  # (N, out)
        for expert, slots, tokens in _groups(order, counts, weights.shape[1]):
            h = x[tokens] @ A[expert].t()  # (n, r)
            scaled = h * weights.flatten()[slots, None].to(h.dtype)  # (n, r)
            mixed.index_add_(0, tokens, scaled @ B[expert].t(), alpha=scaling)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, order, A, B = ctx.saved_tensors
        flat_weights = weights.flatten()  # (N*k,)
        grad_x, grad_weights = torch.zeros_like(x), torch.zeros_like(flat_weights)
        grad_A, grad_B = torch.zeros_like(A), torch.zeros_like(B)
        for expert, slots, tokens in _groups(order, ctx.counts, weights.shape[1]):
            x_e, grad_e = x[tokens], grad[tokens]  # (n, in), (n, out)
            weight = flat_weights[slots, None].to(x.dtype)  # (n, 1)
            h = x_e @ A[expert].t()  # (n, r)
            grad_scaled = (grad_e @ B[expert]).mul_(ctx.scaling)  # (n, r)
            grad_weights[slots] = (grad_scaled * h).sum(dim=-1).to(flat_weights.dtype)
            grad_B[expert] = (grad_e.t() @ (h * weight)).mul_(ctx.scaling)  # (out, r)
            grad_h = grad_scaled * weight  # (n, r)
            grad_A[expert] = grad_h.t() @ x_e  # (r, in)
            grad_x.index_add_(0, tokens, grad_h @ A[expert])
        return grad, grad_x, grad_weights.view_as(weights), None, grad_A, grad_B, None, None


def mix_sorted(
    y: Tensor, x: Tensor, weights: Tensor, indices: Tensor, A: Tensor, B: Tensor, scaling: float, in_place: bool = False
) -> Tensor:
    """``y + scaling * sum_{j<k} weights_j B_{e_j} A_{e_j} x`` with each token visiting only its experts.

    Args:
        y: output of the frozen layer, ``(N, out)``.
        x: its input, ``(N, in)``.
        weights: ``(N, k)``.
        indices: the experts of each token, distinct within a token, ``(N, k)``.
        A: down projections, ``(E, r, in)``.
        B: up projections, ``(E, out, r)``.
        scaling: LoRA's ``lora_alpha / r``.
        in_place: add into ``y``, which then must be nobody else's: no saved output, no reference kept.

    Returns:
        ``(N, out)``; in the memory of ``y`` where ``in_place``.
    """
    mixed: Tensor = _MixSorted.apply(y, x, weights, indices, A, B, scaling, in_place)
    return mixed


def _groups(order: Tensor, counts: list[int], top_k: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert in use: its index, its slots of the flattened (N, k), and the tokens those belong to."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            slots = order[start : start + count]
            yield expert, slots, slots // top_k
            start += count
