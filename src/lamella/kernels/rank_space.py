"""Routers that read what frozen LoRAs put out, without ever computing it: everything is said in their rank space.

A router's input is the concatenation ``E`` of the outputs ``E_im = B_im h_im`` of LoRA i in each of the M matrices that
it reads, with ``h_im = A_im x`` (MOLE eq. 9-10); D numbers in all, zeros for a LoRA that a matrix does not have.
It is normalised as a whole, LayerNorm without affine, and multiplied by a learnable e. With h alone at hand:

* ``e_im . (B_im h_im) = (B_im^T e_im) . h_im``;
* the mean of E is ``mu = sum_im out_m mean_im / D``, with ``mean_im = (column means of B_im) . h_im``;
* its variance is what varies within the outputs and between them,
  ``(1/D) sum_im (|C_im h_im|^2 + out_m (mean_im - mu)^2)`` with ``C_im = B_im`` less its column means, and
  ``|C h|^2 = h^T (C^T C) h`` takes an ``r x r`` Gram matrix. No two large numbers are subtracted;
* ``logits = (e . E - mu sum(e)) / sqrt(var + eps) + bias``.

A mean over tokens goes through linear maps, so the mean output of a LoRA is ``B_im`` of the mean h, itself ``A_im`` of
the mean x: pool first, and read a single row for a sequence.
"""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lamella.kernels.frozen import FrozenLoras, split_columns, split_loras, sum_per_lora

# Far below the square of any LoRA's output, so that the logits do not depend on the outputs' scale.
_EPS = 1e-12


def read_outputs(h: Sequence[Tensor], loras: Sequence[FrozenLoras], e: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits from the normalised outputs of all LoRAs for each row, such as a token or a sequence's mean.

    Args:
        h: ``A_m x`` for each of the M matrices that are read, ``(*rows, R_m)``.
        loras: those matrices' LoRAs; K in each.
        e: ``(K, K, D')``: for each logit and LoRA, what it takes from that LoRA's outputs in the M matrices, side by
            side; ``D'`` is the sum of their widths.
        bias: ``(K,)``.

    Returns:
        ``(*rows, K)`` in float32 or wider.
    """
    return _read([one[..., None, :] for one in h], loras, e[:, None], bias)


def read_positions(h: Sequence[Tensor], loras: Sequence[FrozenLoras], e: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits of a sequence of fixed length from the outputs at all its positions, as MOLE is published (eq. 10).

    E is normalised over all positions, LoRAs and features together.

    Args:
        h: ``A_m x`` for each of the M matrices that are read, ``(batch, L, R_m)``; zeros at padding.
        loras: those matrices' LoRAs; K in each.
        e: ``(K, L, K, D')``.
        bias: ``(K,)``.

    Returns:
        ``(batch, K)`` in float32 or wider.
    """
    return _read(h, loras, e, bias)


def _read(h: Sequence[Tensor], loras: Sequence[FrozenLoras], e: Tensor, bias: Tensor | None) -> Tensor:
    """As above for ``h (*rows, P, R_m)`` and ``e (K, P, K, D')``."""
    widths = [len(frozen.B) for frozen in loras]  # out_m
    total = e[0].numel()  # D
    with torch.autocast(e.device.type, enabled=False):
        e = _widen(e)
        scores, means, within = [], [], []
        for one, frozen, part in zip(h, loras, e.split(widths, dim=-1), strict=True):
            one, B = _widen(one), _widen(frozen.B)
            column_means = B.mean(dim=0)  # (R,)
            scores.append(torch.einsum("...pr,kpr->...k", one, _pull_back(part, B, frozen.ranks)))
            means.append(sum_per_lora(one * column_means, frozen.ranks))  # (*rows, P, K)
            within.append(_squared_norm(one, B - column_means, frozen.ranks))  # (*rows,)
        mean = _sum(width * m.sum(dim=(-2, -1)) for width, m in zip(widths, means, strict=True)) / total  # (*rows,)
        between = [
            width * (m - mean[..., None, None]).square().sum(dim=(-2, -1))
            for width, m in zip(widths, means, strict=True)
        ]
        variance = _sum([*within, *between]) / total  # (*rows,)
        centred = _sum(scores) - mean[..., None] * e.sum(dim=(1, 2, 3))  # (*rows, K)
        logits = centred * torch.rsqrt(variance + _EPS)[..., None]
        return logits if bias is None else logits + _widen(bias)


def _pull_back(e: Tensor, B: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """``B_i^T e_i`` for all LoRAs side by side: ``(K, P, K, out)`` and ``(out, R)`` to ``(K, P, R)``."""
    pieces = zip(split_loras(e, ranks, dim=2), split_columns(B, ranks), strict=True)
    return torch.cat([torch.einsum("kpio,oir->kpir", piece, up).flatten(-2) for piece, up in pieces], dim=-1)


def _squared_norm(h: Tensor, B: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """``sum_i |B_i h_i|^2`` over positions and LoRAs by the Gram matrices of B: ``(*rows, P, R)`` to ``(*rows,)``."""
    norms = []
    for part, up in zip(split_columns(h, ranks), split_columns(B, ranks), strict=True):  # (*rows, P, n, r), (out, n, r)
        gram = torch.einsum("oir,ois->irs", up, up)  # (n, r, r)
        norms.append((torch.einsum("...ir,irs->...is", part, gram) * part).sum(dim=(-3, -2, -1)))
    return _sum(norms)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return functools.reduce(torch.add, terms)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
