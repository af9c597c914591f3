"""Training of a stack of aligners before one frozen expert, each pair as if it were alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from lamella.similarity.alignment.frozen import FrozenExpert
from lamella.similarity.alignment.pull import TargetPull
from lamella.similarity.alignment.stack import Stack

CHECK_EVERY = 10  # steps between looks at the stop part
PATIENCE = 5  # looks without a better value after which a pair is done


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of S sources, padded to the longest.

    Attributes:
        x: what the sources were given, ``(S, n, h)``.
        y: what they put out, ``(S, n, out)``.
        weight: of each token, ``(S, n, 1)``: 1 / its source's number of tokens, 0 for padding.
    """

    x: Tensor
    y: Tensor
    weight: Tensor


def stack_tokens(tokens: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """A batch of each source's inputs ``(n, h)`` and outputs ``(n, out)``."""
    longest = max(len(x) for x, _ in tokens)
    x, y = tokens[0]
    inputs, outputs = x.new_zeros(len(tokens), longest, x.shape[1]), y.new_zeros(len(tokens), longest, y.shape[1])
    weight = x.new_zeros(len(tokens), longest, 1)
    for at, (x, y) in enumerate(tokens):
        inputs[at, : len(x)], outputs[at, : len(y)], weight[at, : len(x)] = x, y, 1.0 / len(x)
    return Batch(inputs, outputs, weight)


@dataclass(frozen=True, eq=False)
class Trained:
    """What became of a stack.

    Attributes:
        parameters: of each pair's best aligner by the stop part (of the last, where there is none), ``(S, ...)``.
        steps: that led to it, ``(S,)``.
        loss: of the last step taken, before its update, ``(S,)``; without a pull.
    """

    parameters: dict[str, Tensor]
    steps: Tensor
    loss: Tensor


@torch.no_grad()
def train(
    stack: Stack,
    target: FrozenExpert,
    batch: Batch,
    scale: Tensor,
    *,
    steps: int,
    lr: float,
    stop: Batch | None = None,
    pull: TargetPull | None = None,
) -> Trained:
    """Full-batch Adam on scale · mean (target(A(x)) − y)², as published up to the scale, stopped early pair by pair.

    With a stop part, every pair keeps the state that was best on it, and is done when ``PATIENCE`` looks at it, one
    every ``CHECK_EVERY`` steps, brought nothing better. The start counts as a state.

    Args:
        stack: the aligners; trained in place.
        target: the expert that they stand before.
        batch: the tokens to train on.
        scale: of each pair's loss, ``(S,)``.
        steps: at most.
        lr: step size of Adam.
        stop: the tokens that decide when to stop.
        pull: adds its own loss on A(x).
    """
    optimizer = _Adam(stack, lr)
    steps = steps if len(stack.flat) else 0
    best = _Best(stack, len(scale), scale.device)
    weight = batch.weight * (2.0 * scale / batch.y.shape[-1])[:, None, None]
    loss = torch.full_like(scale, torch.nan)
    for step in range(steps):
        if (
            stop is not None
            and step % CHECK_EVERY == 0
            and best.look(step, _objective(stack, target, stop, scale, pull))
        ):
            return Trained(best.parameters, best.steps, loss)
        aligned = stack.forward(batch.x)
        error = target.forward(aligned.flatten(0, 1)).view_as(batch.y).sub_(batch.y)
        if step == steps - 1:
            loss = mean_square(error, batch.weight) * scale
        gradient = target.backward(error.mul_(weight).flatten(0, 1)).view_as(aligned)
        if pull is not None:
            gradient += pull.gradient(aligned, batch.weight)
        stack.backward(gradient)
        optimizer.step()
    if stop is None:
        return Trained(stack.parameters, torch.full_like(scale, steps, dtype=torch.long), loss)
    best.look(steps, _objective(stack, target, stop, scale, pull))
    return Trained(best.parameters, best.steps, loss)


def mean_square(error: Tensor, weight: Tensor) -> Tensor:
    """The mean over a source's tokens and elements of ``error² (S, n, out)``, ``(S,)``."""
    return (torch.linalg.vector_norm(error, dim=-1, keepdim=True).square_() * weight).sum((1, 2)) / error.shape[-1]


def _objective(stack: Stack, target: FrozenExpert, batch: Batch, scale: Tensor, pull: TargetPull | None) -> Tensor:
    """The loss that is trained, on other tokens, ``(S,)``."""
    aligned = stack.forward(batch.x)
    error = target.forward(aligned.flatten(0, 1)).view_as(batch.y).sub_(batch.y)
    value = mean_square(error, batch.weight) * scale
    return value if pull is None else value + pull.value(aligned, batch.weight)


class _Adam:
    """Torch's fused Adam on all parameters of a stack as one; its optimiser class costs as much as small steps do."""

    def __init__(self, stack: Stack, lr: float) -> None:
        self._stack, self._lr = stack, lr
        self._moments = torch.zeros_like(stack.flat), torch.zeros_like(stack.flat)
        self._steps = torch.zeros((), device=stack.flat.device)

    def step(self) -> None:
        adam(
            [self._stack.flat],
            [self._stack.flat_gradient],
            [self._moments[0]],
            [self._moments[1]],
            [],
            [self._steps],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


class _Best:
    """The best state of every pair so far."""

    def __init__(self, stack: Stack, pairs: int, device: torch.device) -> None:
        self._stack = stack
        self.parameters = {name: one.clone() for name, one in stack.parameters.items()}
        self.steps = torch.zeros(pairs, dtype=torch.long, device=device)
        self._value = torch.full((pairs,), torch.inf, device=device)
        self._waited = torch.zeros(pairs, dtype=torch.long, device=device)

    def look(self, step: int, value: Tensor) -> bool:
        """Takes in the stop part's value ``(S,)`` after so many steps; True when every pair is done."""
        better = (value < self._value) & (self._waited < PATIENCE)
        self._value = torch.where(better, value, self._value)
        self.steps = torch.where(better, step, self.steps)
        self._waited = torch.where(better, 0, self._waited + 1)
        at = better.nonzero()[:, 0]
        for name, one in self.parameters.items():
            one[at] = self._stack.parameters[name][at]
        return bool((self._waited >= PATIENCE).all())
