"""What one router pays for using its experts unevenly, over real tokens only."""

import torch
from torch import Tensor

from lamella.routing.router import Routing


def balance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Switch-style balance of one router: ``E * sum_e f_e P_e``, which is 1 when all experts are used alike.

    ``f_e`` is the share of all top-k selections that fall on expert e (no gradient), ``P_e`` the mean probability of e.
    Source: MoLA §4.1 and its code, there on the concatenated logits of a layer's modules, where collapsed routers with
    different favourites look balanced; here for each router by itself.

    Args:
        routing: the decision for N tokens.
        mask: True for real tokens, ``(N,)``; None when all are real.

    Returns:
        A scalar.
    """
    num_experts = routing.num_experts
    if mask is None:
        selections = torch.bincount(routing.indices.flatten(), minlength=num_experts)  # (E,)
        mean_probs = routing.probs.sum(dim=0) / max(len(routing.logits), 1)  # (E,)
    else:
        weight = mask.to(routing.logits.dtype)  # (N,)
        picked = weight[:, None].expand_as(routing.indices).flatten()  # (N*k,)
        selections = weight.new_zeros(num_experts).index_add_(0, routing.indices.flatten(), picked)  # (E,)
        mean_probs = weight @ routing.probs / weight.sum().clamp_min(1)  # (E,)
    share = selections / selections.sum().clamp_min(1)  # (E,)
    return num_experts * torch.dot(share.to(mean_probs.dtype), mean_probs)


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of one router's logits (ST-MoE, eq. 5), over real tokens; a scalar."""
    squared = torch.logsumexp(routing.logits, dim=-1).square()  # (N,)
    if mask is None:
        return squared.sum() / max(len(squared), 1)
    weight = mask.to(squared.dtype)  # (N,)
    return torch.dot(weight, squared) / weight.sum().clamp_min(1)
