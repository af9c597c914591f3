"""The form that says what is computed; the others must equal it."""

import torch
from torch import Tensor


def mix_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """``y + scaling * sum_e weights_e B_e A_e x`` for N tokens (MoLA eq. 4, with LoRA's scaling).

    Args:
        y: output of the frozen layer, ``(N, out)``.
        x: its input, ``(N, in)``.
        A: down projections, ``(E, r, in)``.
        B: up projections, ``(E, out, r)``.
        weights: a weight per token and expert, zero where an expert is not used, ``(N, E)``.
        scaling: LoRA's ``lora_alpha / r``.

    Returns:
        ``(N, out)``.
    """
    h = torch.einsum("eri,ni->ner", A, x)  # (N, E, r)
    delta = torch.einsum("eor,ner,ne->no", B, h, weights)  # (N, out)
    return y + scaling * delta
