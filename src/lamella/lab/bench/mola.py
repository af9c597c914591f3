"""A train step with MoLA beside one with LoRA of equal size, the frozen base and the published loop over experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lamella.lab.bench.arms import Trained, build_arms, kept_by_step, steps_of
from lamella.lab.bench.encoder import Batch, build_batch, forward, loss
from lamella.lab.bench.equality import Equality, compare
from lamella.lab.bench.memory import peak_megabytes
from lamella.lab.bench.naive import NaiveMola
from lamella.lab.bench.results import Arm, BenchResult, Case
from lamella.lab.bench.settings import MolaSettings
from lamella.lab.methods import trainable_parameters
from lamella.lab.studies.measuring import clock_for, ratio, time_rounds, using_threads
from lamella.routing import Router
from lamella.tuners.mola.layer import MolaLinear

_RATIOS = (
    ("lora", "frozen"),
    ("mola", "frozen"),
    ("mola balance off", "frozen"),
    ("naive", "frozen"),
    ("mola", "lora"),
    ("mola balance off", "lora"),
    ("naive", "mola"),
    ("naive", "mola balance off"),
)


def bench_mola(settings: MolaSettings, starting: Callable[[str], object] = lambda _: None) -> BenchResult:
    """Compares the outputs and gradients of MoLA and its naive form, then times all arms in one interleaved run.

    Args:
        settings: shape, rounds, threads, precision and device.
        starting: told what begins.

    Raises:
        LamellaError: MoLA and its naive form differ in float64.
    """
    torch.manual_seed(0)
    with using_threads(settings.threads):
        arms = build_arms(settings)
        batch = build_batch(settings.tokens, settings.hidden)
        starting("comparing outputs and gradients in float64")
        equality = check_equality(arms["mola balance off"].model, arms["naive"].model, batch, settings.device)
        for arm in arms.values():
            arm.model.to(settings.device, settings.torch_dtype)
        batch = batch.to(settings.device, settings.torch_dtype)
        starting("measuring what is kept for the backward pass")
        kept = {name: kept_by_step(arm.model, batch) for name, arm in arms.items()}
        steps = steps_of(arms, batch)
        clock = clock_for(settings.threads, settings.device)
        starting(f"timing {settings.rounds} rounds of {', '.join(arms)}: {clock}, {settings.threads} threads")
        seconds = time_rounds(steps, settings.rounds, clock)
        peaks = {name: peak_megabytes(step) for name, step in steps.items()} if settings.device == "cuda" else {}
        case = Case(
            name="train step",
            arms=[_arm(name, arm, seconds[name], kept[name], peaks.get(name)) for name, arm in arms.items()],
            equality=equality,
            ratios=[ratio(seconds, arm, over) for arm, over in _RATIOS],
        )
        return BenchResult(bench="mola", settings=settings.model_dump(mode="json"), clock=clock, cases=[case])


def check_equality(mola: nn.Module, naive: nn.Module, batch: Batch, device: str) -> Equality:
    """Compares a MoLA model without balance loss with its naive form, output and gradients, in float64.

    Both are left in float64 on ``device``, without gradients.

    Raises:
        LamellaError: they differ.
    """
    batch = batch.to(device, torch.float64)
    tensors = []
    for model in (mola, naive):
        model.to(device, torch.float64)
        output = forward(model, batch)
        loss(output, batch).backward()
        tensors.append({"output": output.detach(), **_gradients(model)})
        model.zero_grad(set_to_none=True)
    return compare(*tensors)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the experts and routers of every layer, in lamella's layout, by layer in order."""
    ours = [_mola_gradients(layer) for layer in model.modules() if isinstance(layer, MolaLinear)]
    naive = [layer.gradients() for layer in model.modules() if isinstance(layer, NaiveMola)]
    return {
        f"the gradient of {part} in module {i}": gradient
        for i, parts in enumerate(ours + naive)
        for part, gradient in parts.items()
    }


def _mola_gradients(layer: MolaLinear) -> dict[str, Tensor]:
    (adapter,) = layer.experts
    router = layer.lamella_mola_router[adapter]
    assert isinstance(router, Router)
    tensors = {
        "A": layer.lamella_mola_lora_A[adapter],
        "B": layer.lamella_mola_lora_B[adapter],
        "router": router.weight,
    }
    return {part: tensor.grad for part, tensor in tensors.items() if tensor.grad is not None}


def _arm(name: str, arm: Trained, seconds: list[float], kept: float, peak: float | None) -> Arm:
    return Arm.of(name, arm.what, seconds, trainable_parameters(arm.model), kept, peak)
