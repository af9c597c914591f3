"""Mixtral."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.family import MoEFamily, register, softmax_top_k


@register
class Mixtral(MoEFamily):
    """Softmax over all experts, top-k, always normalised, in float32."""

    sparse: ClassVar = ("MixtralSparseMoeBlock",)

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = router
        return logits, *softmax_top_k(logits, gate.top_k, normalise=True)
