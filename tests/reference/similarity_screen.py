"""Slow, obvious versions of the screen's numbers, in float64."""

from itertools import permutations

import torch


def reach(matrix):
    """Projection on the column space of a matrix, by its pseudo-inverse."""
    matrix = matrix.double()
    return matrix @ torch.linalg.pinv(matrix)


def floor(y, down, bias=None):
    """Squared distance of every output from the nearest point that the target can put out, over the variance."""
    y = y.double()
    shift = 0 if bias is None else bias.double()
    left = [(row - shift) - reach(down) @ (row - shift) for row in y]
    error = sum(float(row @ row) for row in left) / y.numel()
    return error / float((y - y.mean(0)).square().mean())


def predicted(x, y, target, train_x, train_y, source_down, ridge=0.3, stiffness=0.5):
    """What is left of the start's error when its linear part is taken away in the directions that the target has."""
    scales = (1.0, 0.5, 0.25, 0.1)
    some = slice(None, None, 4)
    scale = min(scales, key=lambda one: float((target(one * train_x[some]) - train_y[some]).square().sum()))
    wrong, left = (there.double() - target(scale * here).double() for here, there in ((train_x, train_y), (x, y)))
    one, other = (torch.cat([part.double(), torch.ones(len(part), 1).double()], 1) for part in (train_x, x))
    gram = one.T @ one
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    fitted = other @ torch.linalg.inv(gram) @ one.T @ wrong
    down, stiff = target.down.double(), stiffness * source_down.double().square().sum() / len(source_down)
    soft = down @ torch.linalg.inv(down.T @ down + stiff * torch.eye(down.shape[1])) @ down.T
    return float((left - fitted @ soft).square().mean() / (y - y.mean(0)).double().square().mean())


def cka(first, second):
    """Linear CKA by centred Gram matrices (Kornblith et al., 2019, equation 4 with linear kernels)."""
    n = len(first)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    one, two = (centre @ (x.double() @ x.double().T) @ centre for x in (first, second))
    return float((one * two).sum() / ((one * one).sum() * (two * two).sum()).sqrt())


def weight_distance(first, second):
    """The smallest distance over every order of the second's hidden units; experts of few units only."""
    names = [name for name in ("up", "gate", "up_bias", "gate_bias", "down_bias") if name in first.matrices]
    total = sum(m.double().square().sum() for e in (first, second) for m in e.matrices.values())
    best = torch.inf
    for order in permutations(range(len(second.up))):
        apart = (first.down.double() - second.down.double()[:, order]).square().sum()
        for name in names:
            other = getattr(second, name).double()
            other = other if name == "down_bias" else other[list(order)]
            apart = apart + (getattr(first, name).double() - other).square().sum()
        best = min(best, float(apart))
    return float((best / total) ** 0.5)
