"""Switch Transformers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.expert import Expert, ungated
from lamella.backbones.moe.family import MoEFamily, NativeRouting, register, widen


@register
class Switch(MoEFamily):
    """The one best expert, while it has room: of a sequence's tokens, padding included, it takes the first so many.

    A token without room gets nothing from the layer: it counts as dropped, and not as expert 0's, which is what the
    router's one-hot choice looks like. Tokens ``(N, h)`` count as one sequence.
    """

    sparse: ClassVar = ("SwitchTransformersSparseMLP",)

    def top_k(self, sparse: nn.Module) -> int:
        return 1

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        experts: Any = self.experts(sparse)
        dense = experts[f"expert_{index}"]
        return Expert(dense.wi.weight, dense.wo.weight, ungated(dense.act))

    def read(self, sparse: nn.Module, output: Any, selected: Tensor, weights: Tensor) -> NativeRouting:
        logits = output[2].reshape(-1, output[2].shape[-1])  # (N, E)
        router: Any = self.router(sparse)
        # as the router compares them, in the precision of what it was given
        probs = torch.softmax(logits, dim=-1, dtype=router.dtype).to(weights.dtype)
        kept = selected.any(dim=-1)  # (N, 1)
        logits = widen(logits)
        return NativeRouting(logits, weights.to(logits.dtype) * kept, probs.argmax(dim=-1, keepdim=True), kept=kept)

    def chosen(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        return selected.argmax(dim=-1), selected.any(dim=-1)  # of (N, 1, E)

    def handed(self, sparse: nn.Module, output: Any) -> tuple[Tensor, Tensor]:
        selected, weights, logits = output
        return selected.reshape(-1, 1, logits.shape[-1]), weights.reshape(-1, 1)
