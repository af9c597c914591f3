"""MoLEx written to be read: one sequence, one block, one token at a time. Nothing here imports lamella.

Every function uses plain autograd, so its gradients are the oracle's too. ``h (N, F)`` are the hidden states of one
sequence without padding, ``blocks`` are functions from such states to such states.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Block = Callable[[Tensor], Tensor]


def token_scores(h: Tensor, weight: Tensor, bias: Tensor, candidates: Sequence[int], score: str) -> list[Tensor]:
    """Each token's score of each candidate: a softmax over them, or a sigmoid for each."""
    scores = []
    for token in h:
        logits = torch.stack([torch.dot(weight[c], token) + bias[c] for c in candidates])
        scores.append(torch.sigmoid(logits) if score == "sigmoid" else logits.exp() / logits.exp().sum())
    return scores


def mean_of(scores: Sequence[Tensor]) -> Tensor:
    """The mean score of each candidate."""
    return sum(scores[1:], scores[0]) / len(scores)


def pick(scores: Sequence[Tensor], top_k: int, aggregate: str) -> list[int]:
    """The places of the best candidates: by mean score, or by how many tokens like them best; ties to the smallest."""
    mean = mean_of(scores).tolist()
    votes = [0] * len(mean)
    for token in scores:
        values = token.tolist()
        votes[values.index(max(values))] += 1
    by = mean if aggregate == "mean" else votes
    return sorted(range(len(by)), key=lambda c: (-by[c], c))[:top_k]


def weights_of(mean: Tensor, picked: Sequence[int], form: str) -> list[Tensor]:
    """Renormalised scores times s, which is 1 in value and carries the gradient."""
    total = sum((mean[c] for c in picked[1:]), mean[picked[0]])
    if form == "none":
        return [(mean[c] / total).detach() for c in picked]
    s = total / total.detach() if form == "scale" else 1 + total - total.detach()
    return [s * mean[c] / total for c in picked]


def mix(own: Tensor, guests: Sequence[Tensor], weights: Sequence[Tensor], alpha: float) -> Tensor:
    """``B_t + (1 - alpha) * sum of w_i (B_i - B_t)``."""
    mixed = own
    for guest, weight in zip(guests, weights, strict=True):
        mixed = mixed + (1 - alpha) * weight * (guest - own)
    return mixed


def layer(
    blocks: Sequence[Block],
    t: int,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: float,
    *,
    candidates: Sequence[int],
    top_k: int,
    score: str,
    aggregate: str,
    form: str,
    per_token: bool,
) -> tuple[Tensor, list[list[int]], list[Tensor]]:
    """One depth for one sequence: its output, the block indices chosen, and the mean scores they were chosen by."""
    own = blocks[t](h)
    scores = token_scores(h, weight, bias, candidates, score)
    if not per_token:
        picked, mean = pick(scores, top_k, aggregate), mean_of(scores)
        guests = [blocks[candidates[c]](h) for c in picked]
        return mix(own, guests, weights_of(mean, picked, form), alpha), [[candidates[c] for c in picked]], [mean]
    rows, chosen = [], []
    for n, token in enumerate(scores):
        picked = pick([token], top_k, aggregate)
        guests = [blocks[candidates[c]](h)[n] for c in picked]
        rows.append(mix(own[n], guests, weights_of(token, picked, form), alpha))
        chosen.append([candidates[c] for c in picked])
    return torch.stack(rows), chosen, list(scores)


def balance(means: Sequence[Tensor], chosen: Sequence[Sequence[int]], candidates: Sequence[int]) -> Tensor:
    """``C * sum_e f_e P_e`` over the decisions of one depth, each with its scores as probabilities."""
    size = len(candidates)
    share = [sum(row.count(c) for row in chosen) / sum(map(len, chosen)) for c in candidates]
    probs = mean_of([mean / mean.sum() for mean in means])
    return size * sum((share[e] * probs[e] for e in range(1, size)), share[0] * probs[0])


def of_second_model(block: Block, down: Tensor, shift: Tensor, up: Tensor) -> Block:
    """A block of another width as a guest: what it adds to ``D x + d``, mapped back by U and added to x."""

    def guest(h: Tensor) -> Tensor:
        there = torch.stack([down @ token + shift for token in h])  # (N, G)
        steps = block(there) - there
        return torch.stack([token + up @ step for token, step in zip(h, steps, strict=True)])

    return guest
