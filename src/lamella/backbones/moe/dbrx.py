"""DBRX."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.expert import Expert, Gated
from lamella.backbones.moe.family import MoEFamily, NativeRouting, register


@register
class Dbrx(MoEFamily):
    """The experts' matrices lie one below the other in those of one module; the router puts out its logits alone."""

    sparse: ClassVar = ("DbrxFFN",)

    def top_k(self, sparse: nn.Module) -> int:
        block: Any = sparse
        return int(block.top_k)

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        experts: Any = self.experts(sparse)
        rows = slice(index * experts.ffn_hidden_size, (index + 1) * experts.ffn_hidden_size)
        gate, up, down = (getattr(experts.mlp, name)[rows] for name in ("w1", "v1", "w2"))  # (ff, h) each
        return Expert(up, down.t(), Gated(experts.mlp.activation_fn), gate)

    def read(self, sparse: nn.Module, output: Any, selected: Tensor, weights: Tensor) -> NativeRouting:
        return super().read(sparse, (output,), selected, weights)

    def handed(self, sparse: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        block: Any = sparse
        weights, indices = block.route_tokens_to_experts(output)
        return indices, weights
