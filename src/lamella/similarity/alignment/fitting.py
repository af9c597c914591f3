"""Aligners of many pairs: the sources of one target are trained together, in stacks that fit a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamella.aligners import IDENTITY_SCALES, aligner_class, aligner_parameters, aligner_rank
from lamella.backbones.moe import Expert
from lamella.errors import LamellaError
from lamella.similarity.alignment.frozen import FrozenExpert
from lamella.similarity.alignment.pull import Pull
from lamella.similarity.alignment.sources import Source
from lamella.similarity.alignment.stack import start_stack
from lamella.similarity.alignment.training import Batch, Trained, stack_tokens, train
from lamella.similarity.pairs import Name

BUDGET = 256 * 2**20  # bytes of one stack, activations and optimiser included


@dataclass(frozen=True)
class Settings:
    """How aligners are trained.

    Attributes:
        kind: of the aligners.
        hidden_size: h.
        seed: with the pair it decides the aligner's start.
        steps: at most.
        lr: step size of Adam.
        rank: of low-rank aligners.
        pull: towards the target's inputs; None for none.
    """

    kind: str
    hidden_size: int
    seed: int
    steps: int
    lr: float
    rank: int
    pull: Pull | None = None

    @classmethod
    def checked(
        cls, kind: str, hidden_size: int, seed: int, steps: int, lr: float, rank: int | None, pull: Pull | None
    ) -> Settings:
        """The settings.

        Raises:
            LamellaError: one of them cannot be.
        """
        aligner_class(kind)
        if steps < 1 or not lr > 0 or seed < 0:
            raise LamellaError(f"steps={steps}, lr={lr}, seed={seed}: one step, a positive lr and no negative seed.")
        return cls(kind, hidden_size, seed, steps, lr, aligner_rank(hidden_size, rank), pull)

    @property
    def parameters(self) -> int:
        """Numbers in one aligner."""
        return aligner_parameters(self.kind, self.hidden_size, self.rank)


@dataclass(frozen=True, eq=False)
class Job:
    """One target and the sources that it is to replace.

    Attributes:
        target: its name; `RANDOM` for a random expert.
        expert: itself.
        sources: with tokens.
        inputs: of the target ``(m, h)``, for the pull.
    """

    target: Name
    expert: Expert
    sources: Sequence[Source]
    inputs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained stack, and what it reached.

    Attributes:
        sources: of its pairs, S of them.
        trained: the aligners.
        errors: mean over elements of each held-out token's squared error, for each pair ``(n,)``.
        identity_errors: the same without aligner.
        cosine: between what target and source put out, mean over held-out tokens, ``(S,)``.
        train_mse: on the training tokens, ``(S,)``.
    """

    target: Name
    sources: Sequence[Source]
    trained: Trained
    errors: Sequence[Tensor]
    identity_errors: Sequence[Tensor]
    cosine: Tensor
    train_mse: Tensor


def fit(job: Job, settings: Settings, budget: int = BUDGET) -> Iterator[Fitted]:
    """Trains the aligners of a job, stack by stack; the stacks change no result.

    Raises:
        LamellaError: a pair's error is not finite after training.
    """
    target = FrozenExpert(job.expert, torch.float32)
    pull = None if settings.pull is None or job.inputs is None else settings.pull.towards(job.inputs)
    for sources in _stacks(job, settings, budget):
        device = job.expert.down.device
        training, stopping, scoring = (
            stack_tokens([(part.x.to(device), part.y.to(device)) for part in parts])
            for parts in zip(*((one.train, one.stop, one.held_out) for one in sources), strict=True)
        )
        generators = [_generator(settings.seed, one.name, job.target, device) for one in sources]
        inputs = [one.train.x.to(device) for one in sources]
        stack = start_stack(settings.kind, settings.hidden_size, settings.rank, generators, inputs)
        if (kind := aligner_class(settings.kind)).scales:
            kind.rescale(stack.parameters, _identity_scales(target, training))
        scale = torch.tensor([1.0 / one.train_variance for one in sources], device=device)
        trained = train(stack, target, training, scale, steps=settings.steps, lr=settings.lr, stop=stopping, pull=pull)
        stack.parameters = trained.parameters
        aligned = stack.forward(scoring.x)
        errors, cosine = _compare(target, aligned, scoring)
        identity, _ = _compare(target, scoring.x, scoring)
        train_errors, _ = _compare(target, stack.forward(training.x), training)
        lengths = [len(one.held_out) for one in sources]
        result = Fitted(
            job.target,
            sources,
            trained,
            [row[:n] for row, n in zip(errors, lengths, strict=True)],
            [row[:n] for row, n in zip(identity, lengths, strict=True)],
            cosine,
            (train_errors * training.weight[..., 0]).sum(1),
        )
        _check_finite(result, settings)
        yield result


def _identity_scales(target: FrozenExpert, batch: Batch) -> Tensor:
    """The multiple of the identity that each pair's aligner starts from, ``(S,)``."""
    scales = torch.tensor(IDENTITY_SCALES, device=batch.x.device)
    errors = [(_compare(target, batch.x * one, batch)[0] * batch.weight[..., 0]).sum(1) for one in IDENTITY_SCALES]
    return scales[torch.stack(errors).argmin(0)]


def _compare(target: FrozenExpert, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each token's squared error, mean over elements ``(S, n)``, and the mean cosine of each pair ``(S,)``."""
    y = target.forward(x.flatten(0, 1)).view_as(batch.y)
    cosine = torch.nn.functional.cosine_similarity(y, batch.y, dim=-1)  # (S, n)
    return (y - batch.y).square().mean(-1), (cosine * batch.weight[..., 0]).sum(1)


def _check_finite(fitted: Fitted, settings: Settings) -> None:
    for source, errors in zip(fitted.sources, fitted.errors, strict=True):
        if not errors.isfinite().all():
            raise LamellaError(
                f"The {settings.kind} aligner from expert {source.name[1]} of layer {source.name[0]} to expert "
                f"{fitted.target[1]} of layer {fitted.target[0]} has an error that is not finite; lower lr "
                f"({settings.lr})."
            )


def _stacks(job: Job, settings: Settings, budget: int) -> Iterator[list[Source]]:
    """The sources by number of tokens, so that little is padded, in groups within the budget."""
    stack: list[Source] = []
    for source in sorted(job.sources, key=lambda one: (len(one.train), one.name)):
        if stack and (len(stack) + 1) * _bytes(job, settings, source) > budget:
            yield stack
            stack = []
        stack.append(source)
    if stack:
        yield stack


def pair_bytes(tokens: int, inputs: int, outputs: int, hidden: int, parameters: int) -> int:
    """What a pair holds at most: tokens, what comes of them, their gradients, and six numbers for each parameter."""
    return 4 * (tokens * (7 * inputs + 3 * outputs + 8 * hidden) + 6 * parameters)


def _bytes(job: Job, settings: Settings, source: Source) -> int:
    """The same of one source, with its pull."""
    tokens = max(len(source.train), len(source.held_out))
    hidden, inputs = job.expert.up.shape
    reaches = 0 if settings.pull is None or job.inputs is None else tokens + len(job.inputs)
    return 24 * tokens * reaches + pair_bytes(tokens, inputs, job.expert.down.shape[0], hidden, settings.parameters)


def _generator(seed: int, source: Name, target: Name, device: torch.device) -> torch.Generator:
    """A pair's own random numbers, the same whatever it is trained beside."""
    words = np.random.SeedSequence([seed, *(part + 1 for part in (*source, *target))]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]))
