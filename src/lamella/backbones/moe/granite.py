"""Granite-MoE."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.family import MoEFamily, register


@register
class GraniteMoe(MoEFamily):
    """Top-k of the logits, and a softmax over those k."""

    sparse: ClassVar = ("GraniteMoeMoE",)
    router_name: ClassVar = "router"

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = router
        largest, indices = logits.topk(gate.top_k, dim=-1)
        return logits, torch.softmax(largest, dim=-1), indices
