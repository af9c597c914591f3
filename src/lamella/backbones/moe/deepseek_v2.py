"""DeepSeek-V2."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.family import MoEFamily, register


@register
class DeepseekV2(MoEFamily):
    """Softmax over all experts, top-k within the groups of the best experts, not normalised but scaled."""

    sparse: ClassVar = ("DeepseekV2Moe",)

    def shared(self, sparse: nn.Module) -> Callable[[Tensor], Tensor]:
        block: Any = sparse
        return lambda x: block.shared_experts(x)  # (N, h)

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = router
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        allowed = scores.masked_fill(logits.isneginf(), -torch.inf)
        if gate.topk_method == "group_limited_greedy":
            indices = top_k_in_groups(allowed, best_of_groups(allowed, gate.num_group, 1), gate.topk_group, gate.top_k)
        else:
            indices = allowed.topk(gate.top_k, dim=-1, sorted=False).indices
        return logits, scores.gather(1, indices) * gate.routed_scaling_factor, indices


def best_of_groups(scores: Tensor, num_groups: int, best: int) -> Tensor:
    """The sum of each group's best scores, ``(N, E) -> (N, G)``."""
    return scores.unflatten(-1, (num_groups, -1)).topk(best, dim=-1).values.sum(dim=-1)


def top_k_in_groups(scores: Tensor, group_scores: Tensor, groups: int, top_k: int) -> Tensor:
    """The k best experts of the best groups ``(N, k)``; where those have fewer than k left, others after them.

    Args:
        scores: ``(N, E)``, -inf for experts that may not be chosen.
        group_scores: ``(N, G)``.
        groups: how many groups are chosen from.
        top_k: k; no more than may be chosen.
    """
    inside = torch.zeros_like(group_scores, dtype=torch.bool)
    inside.scatter_(1, group_scores.topk(groups, dim=-1).indices, True)
    inside = inside.repeat_interleave(scores.shape[1] // group_scores.shape[1], dim=1)  # (N, E)
    ranks = scores.argsort(dim=-1).argsort(dim=-1) + scores.shape[1] * inside  # every expert inside before any outside
    return ranks.masked_fill(scores.isneginf(), -1).topk(top_k, dim=-1).indices
