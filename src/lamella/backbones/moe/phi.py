"""Phi-MoE."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.family import MoEFamily, register


@register
class PhiMoe(MoEFamily):
    """SparseMixer (arXiv 2409.12136): the two best, each weighted by a softmax over those that come near it.

    In training it samples; a masked router then samples anew.
    """

    sparse: ClassVar = ("PhimoeSparseMoeBlock",)
    router_name: ClassVar = "router"

    def top_k(self, sparse: nn.Module) -> int:
        return 2  # whatever the config says

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from transformers.models.phimoe.modeling_phimoe import sparsemixer

        gate: Any = router
        return logits, *sparsemixer(logits, jitter_eps=gate.router_jitter_noise, training=gate.training)
