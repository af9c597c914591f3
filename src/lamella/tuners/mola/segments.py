"""Experts that start from segments of the frozen weight's singular vectors (GOAT, arXiv 2502.16894)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.errors import LamellaError

# By how much an expert starts below its segment, GOAT's rho: with all of it, the experts would be large at once.
_RHO = 10.0


def segments(layer: nn.Module, name: str, num_experts: int, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors of E experts, each the first r singular vectors of its own of E equal segments of a weight's spectrum.

    ``scaling B_e A_e`` is the segment over 10, whatever the scaling; its singular values are shared by both factors.
    Source: GOAT §3.2 and its code. Takes one singular value decomposition, as PEFT's PiSSA does.

    Args:
        layer: frozen, linear.
        name: of it.
        num_experts: E.
        r: of each.
        scaling: what ``B A`` is multiplied by.

    Returns:
        ``A (E, r, in)`` and ``B (E, out, r)``, float32.

    Raises:
        LamellaError: the weight's numbers are not at hand, or it has too few singular values.
    """
    weight: Any = layer.weight
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or not weight.isfinite().all():
        raise LamellaError(
            f"init_lora_weights starts from singular vectors of {name}, whose weight is quantised, offloaded or not "
            "finite here. Put the adapter on the model as it was trained, or use init_lora_weights=True."
        )
    matrix = weight.detach().float()
    U, S, V = torch.linalg.svd(matrix.t() if isinstance(layer, Conv1D) else matrix, full_matrices=False)
    length = len(S) // num_experts
    if length < r:
        raise LamellaError(
            f"init_lora_weights starts {num_experts} experts of rank {r} from segments of the singular values of "
            f"{name}, which has {len(S)}. Lower r or num_experts."
        )
    chosen = torch.arange(num_experts)[:, None] * length + torch.arange(r)  # (E, r)
    root = (S[chosen] / (abs(scaling) * _RHO)).sqrt()  # (E, r)
    return root[:, :, None] * V[chosen], (U[:, chosen] * root).permute(1, 0, 2).contiguous()
