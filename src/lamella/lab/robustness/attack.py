"""Projected gradient descent on input embeddings: the noise of a given size that hurts most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.lab.robustness.noise import row_generator


def pgd(
    losses: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    touched: Tensor,
    rows: Sequence[int],
    radius: float,
    seed: int,
    *,
    steps: int = 10,
    step_size: float | None = None,
) -> Tensor:
    """The perturbation (N, T, H) in float32 with the highest loss met on the way of an attack from a random start.

    A sequence's ball has an L2 radius of ``radius`` times the norm of its touched embeddings, which is the expected
    size of Gaussian noise with sigma = radius. Each step goes along the sequence's own normalised gradient, then back
    into the ball. No perturbation at all is one of the candidates, so the loss of no row falls. Of a routed model the
    gradient is that of the experts chosen; a choice has none, so the attack finds no more than a lower bound of what
    can be done to it.

    Args:
        losses: the loss of every sequence (N,) under a perturbation (N, T, H), each a function of its own part of it.
            The model has to be in evaluation mode; parameters get no gradient.
        embeddings: what the embedding module gives for the ids, (N, T, H).
        touched: the tokens that may change, (N, T).
        rows: number of each sequence in its split, N of them; seed and row decide the random start.
        radius: relative to the norm of a sequence's touched embeddings.
        seed: of the random start.
        steps: gradient steps.
        step_size: in radii; 2.5 / steps by default, so that every point of the ball can be reached.

    Raises:
        LamellaError: the radius is negative, there are no steps, or the loss does not depend on the perturbation.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018; in embedding space as in
        Miyato et al., Adversarial Training Methods for Semi-Supervised Text Classification, 2017.
    """
    if not radius >= 0.0 or steps < 1:
        raise LamellaError(f"An attack needs a radius of 0 or more and at least 1 step, not {radius} and {steps}.")
    inside = touched[..., None].float()  # (N, T, 1)
    limit = radius * _norm(embeddings.detach().float() * inside)  # (N, 1, 1)
    stride = limit * (2.5 / steps if step_size is None else step_size)
    delta = _random_start(embeddings, touched, rows, seed) * limit
    with torch.no_grad():
        best, highest = torch.zeros_like(delta), losses(torch.zeros_like(delta))
    for _ in range(steps):
        value, gradient = _loss_and_gradient(losses, delta)
        best, highest = _higher(best, highest, delta, value)
        delta = delta + stride * _unit(gradient * inside)
        delta = delta * (limit / _norm(delta).clamp_min(1e-30)).clamp_max(1.0)
    with torch.no_grad():
        return _higher(best, highest, delta, losses(delta))[0]


def _loss_and_gradient(losses: Callable[[Tensor], Tensor], delta: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        delta = delta.detach().requires_grad_()
        value = losses(delta)  # (N,)
        if not value.requires_grad:
            raise LamellaError("The loss does not depend on the embeddings' perturbation, so it cannot be attacked.")
        # a sequence's loss depends on its own entries, so the sum's gradient holds each one's own
        (gradient,) = torch.autograd.grad(value.sum(), delta)
    return value.detach(), gradient


def _higher(best: Tensor, highest: Tensor, delta: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    better = value > highest  # (N,)
    return torch.where(better[:, None, None], delta, best), torch.where(better, value, highest)


def _random_start(embeddings: Tensor, touched: Tensor, rows: Sequence[int], seed: int) -> Tensor:
    """A point drawn evenly from the unit ball of each sequence's touched entries, (N, T, H)."""
    start = torch.zeros(embeddings.shape, device=embeddings.device)
    for at, row in enumerate(rows):
        shape = embeddings[at, touched[at]].shape  # (n, H)
        generator = row_generator(seed, row)
        direction = torch.from_numpy(generator.standard_normal(tuple(shape), np.float32))
        # the volume of a ball grows with its radius to the power of its dimension
        reach = generator.random() ** (1.0 / max(1, shape.numel()))
        start[at, touched[at]] = (direction / direction.norm().clamp_min(1e-30) * reach).to(start.device)
    return start


def _norm(entries: Tensor) -> Tensor:
    return entries.flatten(1).norm(dim=1)[:, None, None]  # (N, 1, 1)


def _unit(entries: Tensor) -> Tensor:
    return entries / _norm(entries).clamp_min(1e-30)
