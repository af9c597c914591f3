"""A unit's decision, and what can be stated about it by hand."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lamella.tuners.mole.layer import MoleLinear


@dataclass(frozen=True, eq=False)
class ByHand:
    """What was stated for one adapter.

    Attributes:
        kept: True for the LoRAs that are not left out, ``(K,)``; None for all.
        fixed: the weights in place of the routers', ``(K,)`` or ``(batch, K)``; None for the routers' own.
    """

    kept: Tensor | None = None
    fixed: Tensor | None = None

    def weights(self, logits: Tensor, top_k: int | None) -> Tensor:
        """The weights of the LoRAs that are not left out, of the ``top_k`` best of them where it is given."""
        return share_out(self.masked(logits), top_k)

    def masked(self, logits: Tensor) -> Tensor:
        """Minus infinity for the LoRAs that are left out."""
        return logits if self.kept is None else logits.masked_fill(~self.kept.to(logits.device), -torch.inf)

    def stated(self, device: torch.device) -> Tensor:
        """The fixed weights, what the LoRAs left out had being shared out in proportion."""
        assert self.fixed is not None
        fixed = self.fixed.to(device)
        if self.kept is None:
            return fixed
        left = fixed * self.kept.to(device)
        return left * (fixed.sum(dim=-1, keepdim=True) / left.sum(dim=-1, keepdim=True))


def share_out(logits: Tensor, top_k: int | None) -> Tensor:
    """The softmax over the ``top_k`` largest of ``logits (..., K)``, zero for the rest; over all K where it is None.

    Those that tie with the last of them are kept too: no LoRA is preferred for its number, and routers that still are
    zero weigh all LoRAs alike. A single LoRA's weight is 1 whatever its logit, which would tell its router nothing; its
    gradient is that of ``p / stopgrad(p)``, p its softmax over all, as in MoLEx.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return torch.softmax(logits, dim=-1)
    rest = logits < logits.topk(top_k, dim=-1).values[..., -1:]
    weights = torch.softmax(logits.masked_fill(rest, -torch.inf), dim=-1)
    if top_k > 1:
        return weights
    chances = torch.log_softmax(logits, dim=-1)
    return weights * (chances - chances.detach()).masked_fill(rest, 0).exp()


@dataclass(eq=False)
class Decision:
    """A unit's decision in one call.

    Attributes:
        weights: ``(batch, K)``, ``(batch, tokens, K)``, or ``(rows, K)`` outside the blocks.
        by: the module at whose call it was taken.
        rows: of that module's input.
        without: tokens that run with uniform weights, ``(batch, tokens)``; None where there are none.
        uniform: those weights, ``(K,)``.
        handed: to each module given the same input, that input and its ``A x``, until it is called.
    """

    weights: Tensor
    by: "MoleLinear"
    rows: torch.Size
    without: Tensor | None = None
    uniform: Tensor | None = None
    handed: "dict[MoleLinear, tuple[Tensor, Tensor]]" = field(default_factory=dict)
