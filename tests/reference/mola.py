"""MoLA written to be read: one token, one chosen expert at a time. Nothing here imports lamella.

Every function uses plain autograd, so its gradients are the oracle's too. Shapes: ``x (N, in)``, ``A (E, r, in)``,
``B (E, out, r)``, router weight ``(E, in)``, ``mask (N,)``.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def linear_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Each token's score of each expert: a plain dot product."""
    return torch.stack([torch.stack([torch.dot(row, token) for row in weight]) for token in x])


def cosine_logits(x: Tensor, weight: Tensor, log_scale: Tensor) -> Tensor:
    """The cosine of a token's features and an expert's, times ``exp(log_scale)`` but at most 100."""
    scale = torch.minimum(log_scale.exp(), torch.tensor(100.0, dtype=x.dtype))
    return torch.stack(
        [torch.stack([scale * torch.dot(row, token) / (row.norm() * token.norm()) for row in weight]) for token in x]
    )


def choose(logits: Tensor, top_k: int, equal: bool = False) -> list[dict[int, Tensor]]:
    """For each token its chosen experts and their weights: softmax over all, keep the k largest, renormalise.

    One alone weighs 1, and equal ones 1/k, and they tell the router their probability's gradient: it is divided by a
    constant of the same value.
    """
    chosen = []
    for token_logits in logits:
        probs = token_logits.exp() / token_logits.exp().sum()
        best = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:top_k]
        if equal or top_k == 1:
            chosen.append({e: probs[e] / probs[e].detach() / top_k for e in best})
        else:
            total = sum(probs[e] for e in best)
            chosen.append({e: probs[e] / total for e in best})
    return chosen


def without_dropped(chosen: Sequence[dict[int, Tensor]], kept: Tensor, dropout: float) -> list[dict[int, Tensor]]:
    """The chosen experts that a dropout of experts leaves, ``kept (N, k)``, at weights over ``1 - dropout``."""
    return [
        {expert: weight / (1 - dropout) for (expert, weight), stays in zip(weights.items(), row, strict=True) if stays}
        for weights, row in zip(chosen, kept, strict=True)
    ]


def mola(y: Tensor, x: Tensor, A: Tensor, B: Tensor, chosen: Sequence[dict[int, Tensor]], scaling: float) -> Tensor:
    """``y + lora_alpha / r * sum over the chosen experts of weight * B_e A_e x``."""
    rows = []
    for token, base, weights in zip(x, y, chosen, strict=True):
        delta = torch.zeros_like(base)
        for expert, weight in weights.items():
            delta = delta + weight * (B[expert] @ (A[expert] @ token))
        rows.append(base + scaling * delta)
    return torch.stack(rows) if rows else y


def segment_starts(W: Tensor, num_experts: int, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """GOAT's start: expert e is the first r singular triples of the e-th of E equal segments, over ten, unscaled."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    length = len(S) // num_experts
    A, B = [], []
    for e in range(num_experts):
        triples = range(e * length, e * length + r)
        A.append(torch.stack([(S[i] / (10 * scaling)).sqrt() * V[i] for i in triples]))
        B.append(torch.stack([(S[i] / (10 * scaling)).sqrt() * U[:, i] for i in triples], dim=1))
    return torch.stack(A), torch.stack(B)


def less_starts(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, chosen: Sequence[dict[int, Tensor]], scaling: float, published: bool
) -> Tensor:
    """``y`` without what experts started from: of each chosen one by its weight, or as published the mean of all."""
    every = [{e: torch.tensor(1 / len(A), dtype=x.dtype) for e in range(len(A))}] * len(x)
    return mola(y, x, A, B, every if published else chosen, -scaling)


def balance_loss(logits: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """One router's ``E * sum_e f_e P_e`` over the real tokens (MoLA §4.1)."""
    num_experts = logits.shape[1]
    real = [n for n in range(len(logits)) if mask is None or bool(mask[n])]
    picked = [0] * num_experts
    prob = [torch.zeros((), dtype=logits.dtype) for _ in range(num_experts)]
    for n in real:
        probs = logits[n].exp() / logits[n].exp().sum()
        for e in choose(logits[n : n + 1], top_k)[0]:
            picked[e] += 1
        prob = [total + p for total, p in zip(prob, probs, strict=True)]
    loss = torch.zeros((), dtype=logits.dtype)
    for e in range(num_experts):
        loss = loss + picked[e] / (len(real) * top_k) * prob[e] / len(real)
    return num_experts * loss


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the real tokens of the squared log of the softmax's denominator."""
    real = [n for n in range(len(logits)) if mask is None or bool(mask[n])]
    total = torch.zeros((), dtype=logits.dtype)
    for n in real:
        total = total + logits[n].exp().sum().log() ** 2
    return total / len(real)


def balance_of_model(routers: Sequence[tuple[object, Tensor, int, Tensor | None]]) -> Tensor:
    """The whole model's balance: mean over the routers of a block, summed over the blocks.

    ``routers`` holds each router's block, logits, top-k and mask.
    """
    blocks: dict[object, list[Tensor]] = {}
    for block, logits, top_k, mask in routers:
        blocks.setdefault(block, []).append(balance_loss(logits, top_k, mask))
    total = torch.zeros((), dtype=torch.float64)
    for losses in blocks.values():
        total = total + sum(losses) / len(losses)
    return total


def hill_exponent(W: Tensor) -> float:
    """The exponent of the tail of a weight's spectrum, its upper half, by Hill's estimator."""
    values = sorted((torch.linalg.svdvals(W.double()) ** 2).tolist(), reverse=True)
    k = len(values) // 2
    return 1 + k / sum(math.log(values[i] / values[k]) for i in range(k))


def task_diversity(of_tasks: Sequence[Sequence[Tensor]]) -> float:
    """One minus the mean cosine of tasks' mean representations; each task has one representation per document."""
    means = [sum(documents) / len(documents) for documents in of_tasks]
    cosines = [
        float(torch.dot(means[a], means[b]) / (means[a].norm() * means[b].norm()))
        for a in range(len(means))
        for b in range(a)
    ]
    return 1 - sum(cosines) / len(cosines)


def allocation(groups: Sequence[int], layers: int) -> list[int]:
    """Layer l of L belongs to group ``l * G // L``."""
    return [groups[layer * len(groups) // layers] for layer in range(layers)]


def budget_shares(counts: Sequence[int], total: int) -> list[Fraction]:
    """What each layer is owed of a budget, in exact fractions: proportional, but nobody below one."""
    owed = {layer: Fraction(0) for layer in range(len(counts))}
    poor: set[int] = set()
    while True:
        rich = [layer for layer in owed if layer not in poor]
        weight = sum(counts[layer] for layer in rich)
        for layer in rich:
            owed[layer] = Fraction((total - len(poor)) * counts[layer], weight)
        newly = {layer for layer in rich if owed[layer] < 1}
        if not newly:
            return [Fraction(1) if layer in poor else owed[layer] for layer in owed]
        poor |= newly
