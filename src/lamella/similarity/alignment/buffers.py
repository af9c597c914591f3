"""Memory that is used again at every step: asking the system for fresh pages costs as much as small products do."""

import math

import torch
from torch import Tensor


class Buffers:
    """Named tensors to write to; each is made once and again when a larger one is asked for."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A contiguous tensor of this shape, with ``like``'s dtype and device; what was written before is lost."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(shape)
