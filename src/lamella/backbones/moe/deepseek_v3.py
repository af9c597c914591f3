"""DeepSeek-V3."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, inf, nn

from lamella.backbones.moe.deepseek_v2 import DeepseekV2, best_of_groups, top_k_in_groups
from lamella.backbones.moe.family import NativeRouting, register


@register
class DeepseekV3(DeepseekV2):
    """Sigmoid scores; a bias that balances the load takes part in the choice, not in the weights."""

    sparse: ClassVar = ("DeepseekV3MoE",)

    def read(self, router: nn.Module, output: Any) -> NativeRouting:
        routing = super().read(router, output)
        scores = routing.logits.sigmoid()
        return replace(routing, scores=scores / scores.sum(dim=-1, keepdim=True))

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = router
        scores = logits.sigmoid()
        allowed = (scores + gate.e_score_correction_bias).masked_fill(logits.isneginf(), -inf)
        indices = top_k_in_groups(allowed, best_of_groups(allowed, gate.num_group, 2), gate.topk_group, gate.top_k)
        weights = scores.gather(1, indices)
        if gate.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * gate.routed_scaling_factor, indices
