"""OLMoE."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.family import MoEFamily, register, softmax_top_k


@register
class Olmoe(MoEFamily):
    """Softmax over all experts, top-k, normalised where the config says so; as published it is not."""

    sparse: ClassVar = ("OlmoeSparseMoeBlock",)

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = router
        return logits, *softmax_top_k(logits, gate.top_k, gate.norm_topk_prob)
