"""How well LoRAs suit an input, as the papers say it: with whole weight matrices, one LoRA and one input at a time."""

import torch
from torch import Tensor


def spectrum(x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """SpectR: the length of what the delta makes of ``x (in,)``, over the input's own."""
    return torch.linalg.norm(scaling * (B @ A) @ x) / torch.linalg.norm(x)


def arrow(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Arrow: how far ``x (in,)`` lies along the first right singular vector of the delta."""
    _, _, V = torch.linalg.svd(B @ A, full_matrices=False)
    return torch.abs(V[0] @ x) / torch.linalg.norm(x)


def centroids(x: Tensor, middles: Tensor) -> Tensor:
    """ARIADNE: one and the cosine of ``x (in,)`` with the nearest of ``(c, in)``."""
    return 1 + max(middle @ x / (torch.linalg.norm(middle) * torch.linalg.norm(x)) for middle in middles)


def successive_halving(losses: dict[str, list[float]], keep: int, first: int = 4) -> list[str]:
    """Who is left when the worse half goes and the examples double, until all examples are used; the best first."""
    seen = min(first, len(next(iter(losses.values()))))
    left = list(losses)

    def mean(name: str) -> float:
        return sum(losses[name][:seen]) / seen

    while seen < len(losses[left[0]]):
        left = sorted(left, key=mean)[: max(min(keep, len(losses)), (len(left) + 1) // 2)]
        seen = min(2 * seen, len(losses[left[0]]))
    return sorted(left, key=mean)[:keep]
