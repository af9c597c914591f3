"""From per-token values to one value per sequence, over real tokens only."""

import torch
from torch import Tensor


def pool_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the real tokens of each sequence.

    Args:
        values: ``(batch, tokens, features)``.
        mask: True for real tokens, ``(batch, tokens)``; None when all are real.

    Returns:
        ``(batch, features)``; zeros for a sequence without real tokens.
    """
    if mask is None:
        return values.mean(dim=1)
    weight = mask.to(values.dtype)  # (batch, tokens)
    total = torch.einsum("bt,btf->bf", weight, values)
    return total / weight.sum(dim=1, keepdim=True).clamp_min(1)


def pool_mode(choices: Tensor, num_choices: int, mask: Tensor | None = None) -> Tensor:
    """The choice most real tokens of a sequence make; ties go to the smallest.

    Args:
        choices: a choice per token, ``(batch, tokens)`` of integers below ``num_choices``.
        num_choices: how many there are.
        mask: True for real tokens, ``(batch, tokens)``; None when all are real.

    Returns:
        ``(batch,)``.
    """
    return count_votes(choices, num_choices, mask).argmax(dim=-1)


def count_votes(choices: Tensor, num_choices: int, mask: Tensor | None = None) -> Tensor:
    """How many real tokens of a sequence make each choice, ``(batch, num_choices)``; arguments as in ``pool_mode``."""
    votes = torch.nn.functional.one_hot(choices, num_choices)  # (batch, tokens, choices)
    if mask is not None:
        votes = votes * mask[..., None].to(votes.dtype)
    return votes.sum(dim=1)
