"""What the shared router of MOLE reads, with every output computed: one LoRA at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


def logits_of(
    x: Tensor, matrices: Sequence[Sequence[tuple[Tensor, Tensor]]], scaling: float, e: Tensor
) -> tuple[Tensor, Tensor]:
    """``e . LayerNorm(E_i)`` and ``log |E_i|`` for ``x (N, in)``: ``(N, K)`` each.

    Args:
        x: the group's input.
        matrices: for each matrix that is read, A and B of each LoRA.
        scaling: of all.
        e: ``(D,)``.
    """
    products, lengths = [], []
    for loras in zip(*matrices, strict=True):
        outputs = torch.cat([scaling * x @ A.t() @ B.t() for A, B in loras], dim=-1)  # (N, D)
        products.append(torch.nn.functional.layer_norm(outputs, outputs.shape[-1:], eps=1e-12) @ e)
        lengths.append(outputs.norm(dim=-1).log())
    return torch.stack(products, dim=-1), torch.stack(lengths, dim=-1)
