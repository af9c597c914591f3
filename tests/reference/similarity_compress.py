"""Slow, obvious versions of compression and rerouting: token by token, expert by expert."""

import numpy as np
import pandas as pd
import torch


def mixture(dispatch, work):
    """Sum over each token's choices of weight times ``work(token, slot, expert, x)``; None is nothing."""
    rows = []
    for token, x in enumerate(dispatch.x):
        row = torch.zeros_like(x)
        for slot, expert in enumerate(dispatch.routing.indices[token].tolist()):
            if dispatch.routing.kept is not None and not dispatch.routing.kept[token, slot]:
                continue
            output = work(token, slot, expert, x[None])
            if output is not None:
                row = row + dispatch.routing.weights[token, slot] * output[0]
        rows.append(row)
    return torch.stack(rows)


def over_capacity(dispatch, expert, capacity, first):
    """Tokens that the expert has no room for: it takes ``capacity`` real tokens of each sequence."""
    batch, tokens = dispatch.shape
    over = set()
    for sequence in range(batch):
        wanting = []
        for token in range(sequence * tokens, (sequence + 1) * tokens):
            slots = (dispatch.routing.indices[token] == expert).nonzero().flatten().tolist()
            kept = dispatch.routing.kept
            if dispatch.real[token] and slots and (kept is None or kept[token, slots[0]]):
                wanting.append((token, float(dispatch.routing.weights[token, slots[0]])))
        if first == "weight":
            wanting.sort(key=lambda one: -one[1])
        over |= {token for token, _ in wanting[capacity:]}
    return over


def average_linkage(distances, groups):
    """Groups of members, when as many are left: each time the two with the smallest mean distance are joined."""
    left = [[at] for at in range(len(distances))]
    while len(left) > groups:
        means = {
            (a, b): np.mean([distances[i, j] for i in left[a] for j in left[b]])
            for a in range(len(left))
            for b in range(a + 1, len(left))
        }
        a, b = min(means, key=means.get)
        left[a] += left.pop(b)
    return sorted(sorted(group) for group in left)


def identity_table(layers, x):
    """Every ordered pair's normalised error without aligner on the tokens ``x``, as ``align`` names its columns."""
    rows = []
    names = [(layer.index, e) for layer in layers for e in range(layer.num_experts)]
    experts = {(layer.index, e): layer.experts[e] for layer in layers for e in range(layer.num_experts)}
    for source in names:
        y = experts[source](x)
        for target in names:
            if source != target:
                error = float((experts[target](x) - y).square().mean() / (y - y.mean(0)).square().mean())
                rows.append((*source, *target, "pair", "linear", 0, error, error))
    columns = ["source_layer", "source_expert", "target_layer", "target_expert", "kind", "aligner", "seed"]
    return pd.DataFrame(rows, columns=[*columns, "nmse", "identity_nmse"])


def damage_between(layer, x, share, source, target):
    """Sum over the source's tokens of g^2 |f(x) - f'(x)|^2, over the sum of g^2; without its tokens over all of them.

    Each token of ``x`` stands for a share of the text's.
    """
    routing = layer.router(x)
    errors = squares = all_errors = 0.0
    for token, stands_for in enumerate(share.tolist()):
        error = float((layer.experts[source](x[token][None]) - layer.experts[target](x[token][None])).square().sum())
        all_errors += stands_for * error
        for slot, expert in enumerate(routing.indices[token].tolist()):
            if expert == source:
                errors += stands_for * float(routing.weights[token, slot]) ** 2 * error
                squares += stands_for * float(routing.weights[token, slot]) ** 2
    return errors / squares if squares else all_errors


def limited(dispatch, damage, closable, limit):
    """Who works for each token and choice, by (token, choice), where a batch uses at most ``limit`` experts at a place.

    ``damage[j][i]`` is what it costs to give a token of j to i, per squared weight.
    """
    batch, tokens = dispatch.shape
    works = {}
    for place in range(tokens):
        here = [sequence * tokens + place for sequence in range(batch)]
        costs = {}
        for expert in range(len(damage)):
            need = 0.0
            for token in here:
                for slot, chosen in enumerate(dispatch.routing.indices[token].tolist()):
                    if chosen == expert and dispatch.real[token]:
                        need += float(dispatch.routing.weights[token, slot]) ** 2
            best = min(damage[expert][other] for other in range(len(damage)) if other != expert)
            costs[expert] = need * best if expert in closable else float("inf")
        opened = sorted(costs, key=lambda expert: -costs[expert])[:limit]
        for token in here:
            for slot, chosen in enumerate(dispatch.routing.indices[token].tolist()):
                works[token, slot] = chosen if chosen in opened else min(opened, key=lambda to: damage[chosen][to])
    return works
