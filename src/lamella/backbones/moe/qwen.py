"""Qwen2-MoE (Qwen1.5-MoE-A2.7B among them) and Qwen3-MoE."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.family import MoEFamily, register, softmax_top_k


@register
class Qwen3Moe(MoEFamily):
    """Softmax over all experts, top-k, normalised where the config says so."""

    sparse: ClassVar = ("Qwen3MoeSparseMoeBlock",)

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = router
        return logits, *softmax_top_k(logits, gate.top_k, gate.norm_topk_prob)


@register
class Qwen2Moe(Qwen3Moe):
    """The same, beside a shared expert behind a gate of its own."""

    sparse: ClassVar = ("Qwen2MoeSparseMoeBlock",)

    def shared(self, sparse: nn.Module) -> Callable[[Tensor], Tensor]:
        block: Any = sparse
        return lambda x: block.shared_expert_gate(x).sigmoid() * block.shared_expert(x)  # (N, h)
