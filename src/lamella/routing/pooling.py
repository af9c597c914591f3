"""From per-token values to one value per sequence, over real tokens only."""

import torch
from torch import Tensor

from lamella.routing.documents import Rows, Sequences


def pool_mean(values: Tensor, mask: Tensor | None = None, sequences: Sequences | None = None) -> Tensor:
    """Mean over the real tokens of each sequence.

    Args:
        values: ``(batch, tokens, features)``.
        mask: True for real tokens, ``(batch, tokens)``; None when all are real.
        sequences: S of them, in these rows; None where each row is one.

    Returns:
        ``(S, features)``; zeros for a sequence without real tokens.
    """
    packed = sequences is not None and sequences.packed
    if mask is None and not packed:
        return values.mean(dim=1)
    weight = values.new_ones(values.shape[:2]) if mask is None else mask.to(values.dtype)  # (batch, tokens)
    if sequences is None or not packed:
        total = torch.einsum("bt,btf->bf", weight, values)
        return total / weight.sum(dim=1, keepdim=True).clamp_min(1)
    return sequences.total(weight[..., None] * values) / sequences.total(weight)[:, None].clamp_min(1)


def pool_mode(
    choices: Tensor, num_choices: int, mask: Tensor | None = None, sequences: Sequences | None = None
) -> Tensor:
    """The choice most real tokens of a sequence make; ties go to the smallest.

    Args:
        choices: a choice per token, ``(batch, tokens)`` of integers below ``num_choices``.
        num_choices: how many there are.
        mask: True for real tokens, ``(batch, tokens)``; None when all are real.
        sequences: S of them, in these rows; None where each row is one.

    Returns:
        ``(S,)``.
    """
    return count_votes(choices, num_choices, mask, sequences).argmax(dim=-1)


def count_votes(
    choices: Tensor, num_choices: int, mask: Tensor | None = None, sequences: Sequences | None = None
) -> Tensor:
    """How many real tokens of a sequence make each choice, ``(S, num_choices)``; arguments as in ``pool_mode``."""
    votes = torch.nn.functional.one_hot(choices, num_choices)  # (batch, tokens, choices)
    if mask is not None:
        votes = votes * mask[..., None].to(votes.dtype)
    return (sequences or Rows(len(votes))).total(votes)
