"""K frozen LoRAs of one linear layer as one wide LoRA, its rank space weighted: ``y + sum_i G_i s_i B_i A_i x``.

Two GEMMs whatever K is. A and B are constants: kept for the backward pass are ``h = A x`` and the weights, never x and
never one LoRA's output.

A weight's shape says over what it varies. ``h (*rows, R)`` takes weights ``(*some, K)`` where ``some`` is a leading
part of ``rows``: ``(batch, tokens, K)`` per token, ``(batch, K)`` per sequence, ``(K,)`` for the whole call.
"""

import functools
import operator
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella.kernels.dense import target


class FrozenLoras(NamedTuple):
    """K LoRAs side by side in a rank space of R columns.

    Attributes:
        A: down projections, ``(R, in)``.
        B: up projections with each LoRA's scaling inside, ``(out, R)``.
        ranks: each LoRA's share of the R columns; 0 for a LoRA that this layer does not have.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]

    def to(self, dtype: torch.dtype) -> "FrozenLoras":
        """The same LoRAs in another precision."""
        return FrozenLoras(self.A.to(dtype), self.B.to(dtype), self.ranks)

    def on(self, device: torch.device) -> "FrozenLoras":
        """The same LoRAs on another device."""
        return FrozenLoras(self.A.to(device), self.B.to(device), self.ranks)


def concatenate(loras: Sequence[tuple[Tensor, Tensor, float] | None], dtype: torch.dtype) -> FrozenLoras:
    """Puts LoRAs of any ranks side by side, at least one of them present.

    Args:
        loras: ``A (r, in)``, ``B (out, r)`` and the scaling of each; None for a LoRA that this layer does not have.
        dtype: precision of the result. The scaling is multiplied in before rounding to it.
    """
    present = [lora for lora in loras if lora is not None]
    wide = [torch.promote_types(B.dtype, torch.float32) for _, B, _ in present]
    return FrozenLoras(
        A=torch.cat([A.detach().to(dtype) for A, _, _ in present]),
        B=torch.cat([(B.detach().to(w) * s).to(dtype) for (_, B, s), w in zip(present, wide, strict=True)], dim=1),
        ranks=tuple(0 if lora is None else len(lora[0]) for lora in loras),
    )


def leave_out_unused(weights: Tensor, loras: FrozenLoras) -> tuple[Tensor, FrozenLoras]:
    """The LoRAs that have a weight in some row, and their weights; all of them where none has any.

    Args:
        weights: ``(*some, K)``.
        loras: K of them.
    """
    used = weights.detach().reshape(-1, weights.shape[-1]).ne(0).any(dim=0)  # (K,)
    ranks = torch.tensor(loras.ranks, device=used.device)
    left = tuple(ranks[used].tolist())
    if not left:
        return weights, loras
    columns = used.repeat_interleave(ranks)  # (R,)
    return weights[..., used], FrozenLoras(
        loras.A[columns.to(loras.A.device)], loras.B[:, columns.to(loras.B.device)], left
    )


class _MixFrozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, weights: Tensor, B: Tensor, ranks: tuple[int, ...], in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(h, weights, B)
        ctx.ranks = ranks
        scaled = scale_columns(h, weights, ranks)
        return target(y, in_place).addmm_(scaled.flatten(0, 1), B.t())  # (N, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, B = ctx.saved_tensors
        grad_scaled = (grad @ B).view_as(h)  # (S, T, R)
        grad_weights = grad_h = None
        if ctx.needs_input_grad[2]:
            grad_weights = sum_per_lora(sum_rows(grad_scaled * h), ctx.ranks).to(weights.dtype)  # (S, K)
        if ctx.needs_input_grad[1]:
            grad_h = scale_columns(grad_scaled, weights, ctx.ranks)
        return grad, grad_h, grad_weights, None, None, None


def mix_frozen(
    y: Tensor, h: Tensor, weights: Tensor, B: Tensor, ranks: tuple[int, ...], in_place: bool = False
) -> Tensor:
    """``y + sum_i G_i s_i B_i h_i`` from the LoRAs' rank space.

    The gradient of G_i is ``sum over rows and over i's columns of h * (dy B)``, that of h is ``(dy B)`` scaled like h.

    Args:
        y: output of the frozen layer, ``(*rows, out)``.
        h: ``A x``, ``(*rows, R)``.
        weights: G, ``(*some, K)`` with ``some`` a leading part of ``rows``.
        B: up projections with the scaling inside, ``(out, R)``; gets no gradient.
        ranks: of the K LoRAs.
        in_place: add into ``y``, which then must be nobody else's: no saved output, no reference kept.

    Returns:
        ``(*rows, out)``; in the memory of ``y`` where ``in_place``.
    """
    grouped, by_group = group_rows(h, weights)  # (S, T, R), (S, K)
    if torch.compiler.is_compiling():  # a compiler derives a backward pass itself
        scaled = scale_columns(grouped, by_group, ranks).flatten(0, 1)  # (N, R)
        return torch.addmm(y.reshape(-1, y.shape[-1]), scaled, B.t()).view(y.shape)
    mixed: Tensor = _MixFrozen.apply(y.reshape(-1, y.shape[-1]), grouped, by_group, B, ranks, in_place)
    return mixed.view(y.shape)


def group_rows(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(*rows, F)`` and ``(*some, K)`` as S groups of T rows that share a weight: ``(S, T, F)`` and ``(S, K)``."""
    some = weights.shape[:-1]
    assert rows.shape[: len(some)] == some, f"weights {tuple(weights.shape)} do not lead rows {tuple(rows.shape)}"
    groups, each = (functools.reduce(operator.mul, sizes, 1) for sizes in (some, rows.shape[len(some) : -1]))
    return rows.reshape(groups, each, rows.shape[-1]), weights.reshape(groups, weights.shape[-1])


def scale_columns(h: Tensor, weights: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Each LoRA's columns of ``h (S, T, R)`` times its weight ``(S, K)``, in the precision of h: ``(S, T, R)``."""
    weights = weights.to(h.dtype)[:, None]  # (S, 1, K)
    pieces = zip(split_columns(h, ranks), split_loras(weights, ranks, dim=-1), strict=True)
    scaled = [(columns * weight[..., None]).flatten(-2) for columns, weight in pieces]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=-1)


def sum_per_lora(values: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Sums ``values (..., R)`` over each LoRA's columns: ``(..., K)``, zero for a LoRA of rank 0."""
    return torch.cat([columns.sum(dim=-1) for columns in split_columns(values, ranks)], dim=-1)


def sum_rows(values: Tensor) -> Tensor:
    """``(S, T, F)`` summed over each group's rows, in float32 or wider where there are several: ``(S, F)``."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values.sum(dim=1, dtype=torch.promote_types(values.dtype, torch.float32))


def split_columns(values: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """``(..., R)`` by runs of neighbours of equal rank, each ``(..., LoRAs of the run, rank)``.

    All runs in one split: slices one by one would each cost a gradient of the whole size.
    """
    counts = _runs(ranks)
    pieces = values.split([count * rank for rank, count in counts], dim=-1)
    return [piece.unflatten(-1, (count, rank)) for piece, (rank, count) in zip(pieces, counts, strict=True)]


def split_loras(values: Tensor, ranks: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    """What has a place for each of the K LoRAs along ``dim``, by the same runs."""
    return values.split([count for _, count in _runs(ranks)], dim=dim)


def _runs(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Each run's rank, which may be 0, and how many LoRAs it has."""
    return [(rank, len(list(neighbours))) for rank, neighbours in groupby(ranks)]
