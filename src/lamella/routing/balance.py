"""What one router pays for using its experts unevenly, over real tokens only."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lamella.errors import LamellaError


def balance_loss(logits: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Switch-style balance of one router: ``E * sum_e f_e P_e``, which is 1 when all experts are used alike.

    ``f_e`` is the share of all top-k selections that fall on expert e (no gradient), ``P_e`` the mean probability of e.
    Source: MoLA §4.1 and its code, there on the concatenated logits of a layer's modules, where collapsed routers with
    different favourites look balanced; here for each router by itself.

    Args:
        logits: the router's scores for N tokens, ``(N, E)``.
        indices: the experts it chose, ``(N, k)``.
        mask: True for real tokens, ``(N,)``; None when all are real.

    Returns:
        A scalar.
    """
    probs = torch.softmax(logits, dim=-1)  # (N, E)
    weight = _token_weight(logits, mask)  # (N, 1)
    return logits.shape[-1] * (_share(logits, indices, mask) * (weight * probs).sum(dim=0)).sum()


def balance_gradient(logits: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gradient of ``balance_loss`` with respect to the logits, ``E w_n p_n (f - p_n . f)``, ``(N, E)``."""
    probs = torch.softmax(logits, dim=-1)  # (N, E)
    share = _share(logits, indices, mask)  # (E,)
    excess = share - (probs @ share)[:, None]  # (N, E)
    return excess.mul_(probs).mul_(_token_weight(logits, mask) * logits.shape[-1])


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of one router's logits (ST-MoE, eq. 5), over real tokens; a scalar."""
    squared = torch.logsumexp(logits, dim=-1, keepdim=True).square()  # (N, 1)
    return (_token_weight(logits, mask) * squared).sum()


def z_gradient(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gradient of ``z_loss`` with respect to the logits, ``2 w_n log Z_n p_n``, ``(N, E)``."""
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)  # (N, 1)
    return torch.softmax(logits, dim=-1).mul_(2 * _token_weight(logits, mask) * log_z)


def entropy_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far one router's mean entropy is below its maximum, ``ln E - H(p)`` over real tokens; a scalar."""
    probs = torch.softmax(logits, dim=-1)  # (N, E)
    lacking = math.log(logits.shape[-1]) - torch.special.entr(probs).sum(dim=-1, keepdim=True)  # (N, 1)
    return (_token_weight(logits, mask) * lacking).sum()


def entropy_gradient(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gradient of ``entropy_loss`` with respect to the logits, ``w_n p_n (log p_n + H(p_n))``, ``(N, E)``."""
    probs = torch.softmax(logits, dim=-1)  # (N, E)
    entropy = torch.special.entr(probs)
    return (probs * entropy.sum(dim=-1, keepdim=True) - entropy).mul_(_token_weight(logits, mask))


def mean_probs(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each expert's mean probability over the real tokens, ``(E,)``."""
    return (_token_weight(logits, mask) * torch.softmax(logits, dim=-1)).sum(dim=0)


def log_loss(means: Tensor) -> Tensor:
    """``-sum_e log q_e``, q the mean of M routers' mean probabilities; ``E ln E``, its least, where all are used alike.

    It is one loss of all routers together, so that they may prefer different experts. Source: MOLE eq. 14-15.

    Args:
        means: ``(M, E)``.

    Returns:
        A scalar.
    """
    return -_overall(means).log().sum()


def log_gradient(logits: Tensor, mask: Tensor | None, means: Tensor) -> Tensor:
    """Gradient of ``log_loss`` with respect to one of the M routers' logits, ``(N, E)``, given all their means."""
    probs = torch.softmax(logits, dim=-1)  # (N, E)
    pull = -1 / (len(means) * _overall(means))  # (E,): what one more of q_e does
    excess = pull - (probs @ pull)[:, None]  # (N, E)
    return excess.mul_(probs).mul_(_token_weight(logits, mask))


def _overall(means: Tensor) -> Tensor:
    """q, kept from zero so that a LoRA nobody uses still has a finite pull."""
    return means.mean(dim=0).clamp_min(torch.finfo(means.dtype).eps)


@dataclass
class CollectedLoss:
    """The layers' own losses of the forwards inside ``collect_losses``, as differentiable scalars, by module name."""

    by_name: list[tuple[str, Tensor]] = field(default_factory=list)

    def total(self) -> Tensor:
        """Their sum, each already multiplied by its coefficient and its router's share of the block."""
        if not self.by_name:
            raise LamellaError(
                "No balance loss was collected: run a training-mode forward with gradients of a model whose config has "
                "router_aux_loss_coef or router_z_loss_coef above 0 inside `with collect_losses() as losses:`."
            )
        return torch.stack([loss for _, loss in self.by_name]).sum()


@dataclass(eq=False)
class JointBalance:
    """The log balance of all routers of an adapter in one call; its value is known when the last one has decided.

    Attributes:
        coefficient: of the loss.
        means: each router's mean probabilities ``(K,)``, by the router's name.
    """

    coefficient: float
    means: dict[str, Tensor] = field(default_factory=dict)

    def value(self) -> Tensor:
        """A scalar."""
        means = list(self.means.values())
        return self.coefficient * log_loss(torch.stack([mean.to(means[0].device) for mean in means]))

    def gradient(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """With respect to one router's logits, ``(N, K)``."""
        means = torch.stack([mean.to(logits) for mean in self.means.values()])  # (M, K)
        return log_gradient(logits, mask, means).mul_(self.coefficient)


@dataclass(frozen=True)
class RouterLoss:
    """The weighted sum of both, as a function of the router's logits, its choices and the mask."""

    router_aux_loss_coef: float
    router_z_loss_coef: float

    def value(self, logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        """A scalar."""
        loss = self.router_aux_loss_coef * balance_loss(logits, indices, mask)
        return loss + self.router_z_loss_coef * z_loss(logits, mask) if self.router_z_loss_coef else loss

    def gradient(self, logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
        """With respect to the logits, ``(N, E)``."""
        gradient = balance_gradient(logits, indices, mask).mul_(self.router_aux_loss_coef)
        return (
            gradient.add_(z_gradient(logits, mask), alpha=self.router_z_loss_coef)
            if self.router_z_loss_coef
            else gradient
        )


def _token_weight(logits: Tensor, mask: Tensor | None) -> Tensor | float:
    """What a token counts in a mean over real tokens, ``(N, 1)`` or one number for all."""
    if mask is None:
        return 1 / max(len(logits), 1)
    weight = mask.to(logits.dtype)[:, None]  # (N, 1)
    return weight / weight.sum().clamp_min(1)


def _share(logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    """The share of the real tokens' selections that falls on each expert, ``(E,)``."""
    picked = torch.ones_like(indices, dtype=logits.dtype) if mask is None else mask.to(logits.dtype)[:, None]
    counts = logits.new_zeros(logits.shape[-1])  # (E,)
    counts.index_add_(0, indices.flatten(), picked.expand(indices.shape).flatten())
    return counts / counts.sum().clamp_min(1)
