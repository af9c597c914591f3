"""Slow, obvious versions of the criteria: token by token, expert by expert.

A token is ``(x, gates)``: its hidden state ``(h,)`` and, by expert, what the router multiplies that expert's output by.
"""

import itertools

import torch

from lamella.backbones.moe import watch_dispatch


@torch.no_grad()
def tokens_of(model, layer, batches):
    """Every real token of the text that reaches the layer, with its gates and the router's logits."""
    tokens, logits = [], []

    def note(dispatch):
        for at in dispatch.real.nonzero()[:, 0].tolist():
            chosen = zip(dispatch.routing.indices[at].tolist(), dispatch.routing.weights[at].tolist(), strict=True)
            tokens.append((dispatch.x[at], dict(chosen)))
            logits.append(dispatch.routing.logits[at])

    with watch_dispatch(model, [layer], note):
        for batch in batches:
            model(**batch)
    return tokens, torch.stack(logits)


def of_expert(tokens, expert):
    return [(x, gates[expert]) for x, gates in tokens if expert in gates]


def output(layer, expert, x):
    return layer.experts[expert](x[None])[0]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def frequency(layer, tokens, expert):
    return len(of_expert(tokens, expert)) / len(tokens)


def energy(layer, tokens, expert):
    return sum(float((g * output(layer, expert, x)).square().sum()) for x, g in of_expert(tokens, expert)) / len(tokens)


def reap(layer, tokens, expert):
    return mean([g * float(output(layer, expert, x).norm()) for x, g in of_expert(tokens, expert)])


def ean(layer, tokens, expert):
    return sum(float(output(layer, expert, x).norm()) for x, _ in of_expert(tokens, expert)) / len(tokens)


def man(layer, tokens, expert):
    return mean([float(output(layer, expert, x).norm()) for x, _ in of_expert(tokens, expert)])


def aimer(layer, tokens, expert):
    weights = torch.cat([matrix.flatten() for matrix in layer.experts[expert].matrices.values()])
    return -float(weights.abs().mean() / weights.square().mean().sqrt())


def mean_output(layer, tokens, expert):
    return torch.stack([output(layer, expert, x) for x, _ in of_expert(tokens, expert)]).mean(0)


def mean_damage(layer, tokens, expert):
    constant = mean_output(layer, tokens, expert)
    return sum(
        g**2 * float((output(layer, expert, x) - constant).square().sum()) for x, g in of_expert(tokens, expert)
    ) / len(tokens)


def mone(layer, tokens, expert):
    outputs = torch.stack([output(layer, expert, x) for x, _ in of_expert(tokens, expert)])
    deviation = outputs.var(0, unbiased=False).sqrt().norm()
    return float(deviation) * sum(g for _, g in of_expert(tokens, expert)) / len(tokens)


def replacement(layer, tokens, expert, other):
    return sum(
        g**2 * float((output(layer, expert, x) - output(layer, other, x)).square().sum())
        for x, g in of_expert(tokens, expert)
    ) / len(tokens)


def stand_in_total(layer, tokens, kept):
    """Each expert that is gone goes to the one that is left for which its damage is least."""
    gone = set(range(layer.num_experts)) - set(kept)
    return sum(min(replacement(layer, tokens, one, other) for other in kept) for one in gone)


def layer_output(layer, x, gone):
    if gone:
        with layer.mask(gone):
            routing = layer.router(x[None, None])
    else:
        routing = layer.router(x[None, None])
    chosen = zip(routing.indices[0].tolist(), routing.weights[0], strict=True)
    return sum(weight * output(layer, expert, x) for expert, weight in chosen)


def reconstruction_total(layer, tokens, gone):
    """The error of the whole layer, the router deciding among the experts that are left."""
    return sum(
        float((layer_output(layer, x, []) - layer_output(layer, x, gone)).square().sum()) for x, _ in tokens
    ) / len(tokens)


def greedy(experts, total, fewest):
    """Order and costs where always the expert goes whose loss adds the least to ``total(gone)``."""
    gone, costs, before = [], [], 0.0
    while experts - len(gone) > fewest:
        after = {one: total([*gone, one]) for one in range(experts) if one not in gone}
        best = min(after, key=after.get)
        gone.append(best)
        costs.append(after[best] - before)
        before = after[best]
    return gone, costs


def all_means(layer, tokens):
    """Each expert's mean output over all tokens, its own or not."""
    return [torch.stack([output(layer, e, x) for x, _ in tokens]).mean(0) for e in range(layer.num_experts)]


def hc_smoe_distances(layer, tokens):
    means = all_means(layer, tokens)
    return [[float((a - b).norm()) for b in means] for a in means]


def m_smoe_groups(layer, tokens, logits, kept):
    """The least used go to the most similar of the most used, by the direction of their router logits."""
    usage = [frequency(layer, tokens, e) for e in range(layer.num_experts)]
    centres = sorted(range(layer.num_experts), key=lambda e: -usage[e])[:kept]
    groups = {centre: {centre} for centre in centres}
    for expert in set(range(layer.num_experts)) - set(centres):
        cosines = {c: float(torch.cosine_similarity(logits[:, expert], logits[:, c], dim=0)) for c in centres}
        groups[max(cosines, key=cosines.get)].add(expert)
    return groups


def ream_groups(layer, tokens, logits, kept, most=16):
    saliency = [reap(layer, tokens, e) for e in range(layer.num_experts)]
    centres = sorted(range(layer.num_experts), key=lambda e: -saliency[e])[:kept]
    means, profiles = all_means(layer, tokens), [column / column.norm() for column in logits.T]
    pairs = itertools.product(range(layer.num_experts), repeat=2)
    apart = {(a, b): float((profiles[a] - profiles[b]).norm()) for a, b in pairs}
    widest = max(apart.values())

    def near(a, b):
        cosine = float(torch.cosine_similarity(means[a], means[b], dim=0))
        return ((1 + cosine) / 2 + 1 - apart[a, b] / widest) / 2

    groups, free = {}, set(range(layer.num_experts)) - set(centres)
    for centre in centres:
        nearest = sorted(free, key=lambda one: -near(centre, one))[: most - 1]
        groups[centre] = {centre, *nearest}
        free -= set(nearest)
    return groups
