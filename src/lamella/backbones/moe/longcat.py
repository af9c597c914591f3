"""LongCat-Flash."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.expert import Expert, Gated
from lamella.backbones.moe.family import MoEFamily, NativeRouting, register
from lamella.backbones.moe.interventions import put


@register
class Longcat(MoEFamily):
    """Behind the experts come identities, which a token may choose too: they give it back as it is, weighted.

    They are no experts: what they put out is what the layer does beside its experts, and a token that chooses one
    counts for no expert.
    """

    sparse: ClassVar = ("LongcatFlashMoE",)
    pools: ClassVar = False

    def num_experts(self, sparse: nn.Module) -> int:
        return int(self.experts(sparse).num_routed_experts)  # type: ignore[arg-type]

    def columns(self, sparse: nn.Module) -> int:
        return int(self.experts(sparse).total_experts)  # type: ignore[arg-type]

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        experts: Any = self.experts(sparse)
        gate, up = experts.gate_up_proj[index].chunk(2)  # (ff, h) each
        return Expert(up, experts.down_proj[index], Gated(experts.act_fn), gate)

    def shared(self, sparse: nn.Module) -> Callable[[Tensor], Tensor]:
        def identities(hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            weight = weights.masked_fill(indices < self.num_experts(sparse), 0).sum(dim=-1, keepdim=True)  # (N, 1)
            return hidden * weight.to(hidden.dtype)

        def beside(x: Tensor) -> Tensor:
            with put(self.experts(sparse), "forward", lambda _: identities):
                output: Tensor = sparse.forward(x[None])
            return output.view(x.shape)

        return beside

    def read(self, sparse: nn.Module, output: Any, selected: Tensor, weights: Tensor) -> NativeRouting:
        experts = self.num_experts(sparse)
        skipped = selected >= experts
        # an identity stands at an expert that the token has not chosen, with weight 0
        chosen = torch.zeros_like(output[0]).scatter_(1, selected, 1)[:, :experts]  # (N, E)
        others = chosen.argsort(dim=-1, stable=True)  # (N, E)
        nth = (skipped.cumsum(dim=-1) - 1).clamp_min(0)  # (N, k)
        indices = torch.where(skipped, others.gather(1, nth), selected)
        routing = super().read(sparse, (output[0][:, :experts],), indices, weights.masked_fill(skipped, 0))
        return replace(routing, kept=~skipped, skipped=skipped)
