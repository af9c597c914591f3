"""The form for few tokens without gradients, as in decoding: nothing is kept, and no factor is laid out anew.

Of one token only the chosen experts are read. Of several, all are: what they choose together is most of them.
"""

import torch
from torch import Tensor

# Up to so many tokens the experts' up projections are cheaper to add one by one, as they lie, than to lay out for one
# GEMM. Measured on CPU at widths 576 and 1536: 0.4 to 0.8 of the dense form's time at 1 to 16 tokens.
FEW = 16


def mix_few(
    y: Tensor, x: Tensor, weights: Tensor | None, indices: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """``y + scaling * sum_{j<k} weights_j B_{e_j} A_{e_j} x`` of few tokens.

    Args:
        y: output of the frozen layer, ``(N, out)``.
        x: its input, ``(N, in)``.
        weights: ``(N, k)``; None where there is one expert, of weight one.
        indices: the experts of each token, distinct within a token, ``(N, k)``; None where there is one.
        A: down projections, ``(E, r, in)``; ``(1, r, in)`` where all share one.
        B: up projections, ``(E, out, r)``.
        scaling: LoRA's ``lora_alpha / r``.

    Returns:
        ``(N, out)``.
    """
    spread = None
    if weights is not None and indices is not None:
        if x.shape[0] != 1:
            spread = weights.new_zeros(x.shape[0], B.shape[0]).scatter_(1, indices, weights)  # (N, E)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _mix_where_they_lie(y, x, weights, indices, A, B, scaling)
        else:  # to read which are chosen would wait for the device
            A = A if A.shape[0] == 1 else A.index_select(0, indices[0])  # (k, r, in)
            B, spread = B.index_select(0, indices[0]), weights  # (k, out, r), (1, k)
    h = torch.nn.functional.linear(x, A.flatten(0, 1))  # (N, J*r)
    h = h.view(x.shape[0], A.shape[0], A.shape[1]).transpose(0, 1)  # (J, N, r)
    if spread is not None:
        h = h * spread.to(h.dtype).t()[..., None]  # (J, N, r)
    return torch.addbmm(y, h, B.transpose(1, 2), alpha=scaling)  # (N, out)


def _mix_where_they_lie(
    y: Tensor, x: Tensor, weights: Tensor, indices: Tensor, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """Of one token, whose experts are read one after the other, without a copy."""
    mixed, read = y.view(-1), x.view(-1)  # (out,), (in,)
    shared = torch.mv(A[0], read) if A.shape[0] == 1 else None  # (r,)
    for expert, weight in zip(*indices.tolist(), *weights.tolist(), strict=True):
        h = torch.mv(A[expert], read) if shared is None else shared  # (r,)
        mixed = torch.addmv(mixed, B[expert], h, alpha=scaling * weight)  # (out,)
    return mixed.view(1, -1)
