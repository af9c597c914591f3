"""Switch Transformers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.expert import Expert
from lamella.backbones.moe.family import MoEFamily, NativeRouting, register, ungated, widen


@register
class Switch(MoEFamily):
    """The one best expert, while it has room: of a sequence's tokens, padding included, it takes the first so many.

    A token without room gets nothing from the layer: it counts as dropped, and not as expert 0's, which is what the
    router's one-hot choice looks like. Tokens ``(N, h)`` count as one sequence.
    """

    sparse: ClassVar = ("SwitchTransformersSparseMLP",)
    router_name: ClassVar = "router"
    logits_at: ClassVar = 2

    def top_k(self, sparse: nn.Module) -> int:
        return 1

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        experts: Any = self.experts(sparse)
        dense = experts[f"expert_{index}"]
        return Expert(dense.wi.weight, dense.wo.weight, ungated(dense.act))

    def read(self, router: nn.Module, output: Any) -> NativeRouting:
        selected, weights, logits = (part.reshape(-1, part.shape[-1]) for part in output)  # (N, E), (N, 1), (N, E)
        indices = _best(router, logits, weights.dtype)[..., None]  # (N, 1)
        kept = selected.any(dim=-1, keepdim=True)
        logits = widen(logits)
        return NativeRouting(logits, weights.to(logits.dtype) * kept, indices, kept=kept)

    def route(self, sparse: nn.Module, x: Tensor) -> NativeRouting:
        router = self.router(sparse)
        return self.read(router, router(x))

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = router
        selected = nn.functional.one_hot(_best(router, logits, gate.input_dtype), logits.shape[-1])
        selected = selected * (selected.cumsum(dim=-2) <= gate.expert_capacity)
        return selected, _probs(router, logits, gate.input_dtype).amax(dim=-1, keepdim=True), logits

    def chosen(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        return selected.argmax(dim=-1), selected.any(dim=-1)  # of (N, 1, E)


def _probs(router: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities as the router compares them, in the precision of what it was given."""
    return torch.softmax(logits, dim=-1, dtype=router.dtype).to(dtype)


def _best(router: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
    return _probs(router, logits, dtype).argmax(dim=-1)
