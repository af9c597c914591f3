"""Training the routers in a pipeline. No trainer of transformers' fits one, so the loop is written out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lamella.diffusion.composition import PipelineComposition
from lamella.errors import LamellaError
from lamella.routing import collect_losses

Loss = Callable[[Any, Sequence[str], Tensor, Generator], Tensor]


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Samples that are trained on together.

    Attributes:
        prompts: one per sample.
        latents: clean ones as the VAE gives them, times its scaling factor, ``(batch, channels, height, width)``.
    """

    prompts: Sequence[str]
    latents: Tensor


@dataclass(frozen=True)
class ImageStep:
    """One step, as the log has it.

    Attributes:
        step: from 1.
        loss: the task's.
        balance: what the routers pay for uneven weights, coefficient included; 0 where they pay nothing.
        gradient_norm: over all routers, before the step.
    """

    step: int
    loss: float
    balance: float
    gradient_norm: float


def train_routers(
    composition: PipelineComposition,
    loss: Loss,
    batches: Sequence[ImageBatch],
    steps: int = 400,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> list[ImageStep]:
    """Trains a composition's routers and temperatures with AdamW; all else stays as it is, bit for bit.

    MOLE trains 400 steps with batches of 2 at a learning rate of 1e-5 (arXiv 2404.13628, section 4.1), which moves
    routers that start at zero and read a mean only a little; the default here is larger.

    Args:
        composition: of ``lamella.compose_pipeline`` or ``lamella.load_pipeline``.
        loss: of the pipeline, prompts, latents and a generator: ``denoising_loss``, a ``ClipGuidance``, or your own.
            The balance losses of the composed models are added to it.
        batches: drawn at random, each as often as the others.
        steps: how many.
        learning_rate: constant.
        weight_decay: AdamW's.
        seed: of the order of batches, and of the times and noise that the loss draws.

    Returns:
        A row per step.

    Raises:
        LamellaError: nothing to train on, a loss that is not finite, or routers that get no gradient.
    """
    if not batches or steps < 1:
        raise LamellaError(f"Training needs a batch and a step at least; there are {len(batches)} and {steps}.")
    generator = Generator().manual_seed(seed)
    parameters = composition.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    order: list[int] = []
    log = []
    modes = [(part.model, part.model.training) for part in composition.components.values()]
    composition.train()
    try:
        for step in range(1, steps + 1):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            task, balance = _losses(composition, loss, batches[order.pop()], generator)
            # Into the routers alone: a VAE and a CLIP model on the way may want gradients of their own.
            (task + balance).backward(inputs=parameters)
            if step == 1:
                _refuse_missing_gradients(composition)
            log.append(ImageStep(step, task.item(), balance.item(), _norm(parameters)))
            _refuse_not_finite(log[-1])
            optimizer.step()
            optimizer.zero_grad()
    finally:
        optimizer.zero_grad()
        for model, mode in modes:
            model.train(mode)
    return log


def _losses(
    composition: PipelineComposition, loss: Loss, batch: ImageBatch, generator: Generator
) -> tuple[Tensor, Tensor]:
    """The task's loss, and the balance of all models that ran."""
    with collect_losses() as collected:
        task = loss(composition.pipe, batch.prompts, batch.latents, generator)
    return task, collected.total() if collected.by_name else task.new_zeros(())


def _norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _refuse_missing_gradients(composition: PipelineComposition) -> None:
    dead = [name for name, router in composition.routers().items() if all(p.grad is None for p in router.parameters())]
    if dead:
        raise LamellaError(
            f"{len(dead)} of {len(composition.routers())} routers get no gradient from this loss, first {dead[0]}: it "
            "does not run that model, or runs it under torch.no_grad. Let the loss encode the prompts itself."
        )


def _refuse_not_finite(row: ImageStep) -> None:
    if not all(map(math.isfinite, (row.loss, row.balance, row.gradient_norm))):
        raise LamellaError(
            f"The loss is {row.loss} at step {row.step}, with a gradient of norm {row.gradient_norm}: not finite. "
            "Lower learning_rate, or run the pipeline in float32 or bfloat16 instead of float16."
        )
