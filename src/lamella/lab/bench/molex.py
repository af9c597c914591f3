"""MoLEx beside plain LoRA of the same rank, in training and in inference, and beside its published form."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertLayer

from lamella.errors import LamellaError
from lamella.lab.bench.arms import kept_by_step, train_step
from lamella.lab.bench.counting import count_block_runs, count_flops
from lamella.lab.bench.encoder import SEQUENCE, Batch, build_batch, build_encoder, forward, loss
from lamella.lab.bench.equality import Equality, compare, worst_of
from lamella.lab.bench.memory import peak_megabytes
from lamella.lab.bench.molex_arms import EXACT, RECOMPUTED, MolexArm, build_molex_arms, molex, routers
from lamella.lab.bench.naive_molex import NaiveMolexBlock, loras, naive_molex_copy
from lamella.lab.bench.results import Arm, BenchResult, Case
from lamella.lab.bench.settings import MolexSettings
from lamella.lab.methods import trainable_parameters
from lamella.lab.studies.measuring import Ratio, clock_for, ratio, time_rounds, using_threads
from lamella.routing import collect_losses

Say = Callable[[str], object]


def bench_molex(settings: MolexSettings, starting: Say = lambda _: None) -> BenchResult:
    """Compares outputs and gradients, then times the train step and inference, each in interleaved runs.

    Args:
        settings: shape, rounds, threads of the train step, precision and device.
        starting: told what begins.

    Raises:
        LamellaError: MoLEx differs from its published form, or from LoRA at alpha=1, or its routers decide otherwise
            than the arms say.
    """
    torch.manual_seed(0)
    with using_threads(settings.threads):
        base = build_encoder(settings.hidden, settings.layers)
        batch = build_batch(settings.tokens, settings.hidden)
        arms = build_molex_arms(settings, base, batch)
        starting("comparing outputs and gradients in float64")
        equality = check_molex_equality(settings, base, arms, batch)
        for arm in arms.values():
            arm.model.to(settings.device, settings.torch_dtype)
        batch = batch.to(settings.device, settings.torch_dtype)
        check_decisions(arms, batch)
        cases = [_train_case(settings, arms, batch, equality, starting)]
        cases += _inference_cases(settings, arms, equality, starting)
        clock = clock_for(settings.threads, settings.device)
        return BenchResult(bench="molex", settings=settings.model_dump(mode="json"), clock=clock, cases=cases)


def check_molex_equality(
    settings: MolexSettings, base: BertModel, arms: Mapping[str, MolexArm], batch: Batch
) -> Equality:
    """Compares, in float64, every MoLEx arm with its naive form, and MoLEx of alpha=1 with plain LoRA.

    All are left in float64 on the settings' device, without gradients.

    Raises:
        LamellaError: two of them differ.
    """
    batch = batch.to(settings.device, torch.float64)
    lora = arms["lora"].model
    assert isinstance(lora, PeftModel)
    pairs: list[tuple[nn.Module, nn.Module]] = [(molex(settings, base, lora, alpha=1), lora)]
    pairs += [
        (arm.model, naive_molex_copy(base, arm.model))
        for arm in arms.values()
        if isinstance(arm.model, PeftModel) and routers(arm.model)
    ]
    found = []
    for ours, theirs in pairs:
        both = [model.to(settings.device, torch.float64) for model in (ours, theirs)]
        found.append(compare(*(_tensors(model, batch) for model in both)))
    return worst_of(found)


def check_decisions(arms: Mapping[str, MolexArm], batch: Batch) -> None:
    """Counts the blocks that each arm runs: only a decision that was taken as stated is timed as that.

    Raises:
        LamellaError: an arm runs another number of blocks than its decisions ask for.
    """
    for name, arm in arms.items():
        blocks = [module for module in arm.model.modules() if isinstance(module, BertLayer)]
        found = count_block_runs(_inference(arm.model, batch), blocks, len(batch.input_ids))
        if abs(found.rows - arm.rows) > 1e-9 or abs(found.calls - arm.calls) > 1e-9:
            raise LamellaError(
                f"The arm {name!r} was to run {float(arm.rows):.3g} blocks per block and sequence in "
                f"{float(arm.calls):.3g} calls, but ran {found.rows:.3g} in {found.calls:.3g}, so nothing was timed. "
                "This is a defect of lamella: please report it with the settings of this run."
            )


def _train_case(
    settings: MolexSettings, arms: Mapping[str, MolexArm], batch: Batch, equality: Equality, starting: Say
) -> Case:
    # A learning rate of 0 does an optimizer's work and leaves every decision as it was checked.
    steps = {name: train_step(arm.model.train(), batch, learning_rate=0.0) for name, arm in arms.items()}
    starting("counting what is computed and kept for the backward pass")
    kept = {name: kept_by_step(arm.model, batch) for name, arm in arms.items()}
    flops = {name: count_flops(step) for name, step in steps.items()}
    clock = clock_for(settings.threads, settings.device)
    starting(f"timing {settings.rounds} train steps of {', '.join(arms)}: {clock}, {settings.threads} threads")
    seconds = time_rounds(steps, settings.rounds, clock)
    peaks = {name: peak_megabytes(step) for name, step in steps.items()} if settings.device == "cuda" else {}
    measured = [_arm(name, arm, seconds[name], flops[name], kept[name], peaks.get(name)) for name, arm in arms.items()]
    return Case(name="train step", arms=measured, equality=equality, ratios=_ratios(arms, seconds))


def _inference_cases(
    settings: MolexSettings, arms: Mapping[str, MolexArm], equality: Equality, starting: Say
) -> list[Case]:
    """A case per batch and number of threads."""
    # Only on the batch they were made for do sequences disagree; nothing is recomputed without a backward pass.
    timed = {name: arm for name, arm in arms.items() if arm.calls <= 2 and name != RECOMPUTED}
    cases = []
    for threads in inference_threads(settings):
        clock = clock_for(threads, settings.device)
        for rows in settings.inference_batches:
            batch = build_batch(rows * SEQUENCE, settings.hidden).to(settings.device, settings.torch_dtype)
            check_decisions(timed, batch)
            forwards = {name: _inference(arm.model, batch) for name, arm in timed.items()}
            flops = {name: count_flops(run) for name, run in forwards.items()}
            name = f"batch {rows}, {threads} thread{'s' if threads > 1 else ''}"
            starting(f"timing {settings.rounds} forwards, {name}: {clock}")
            with using_threads(threads):
                seconds = time_rounds(forwards, settings.rounds, clock)
            measured = [_arm(name, arm, seconds[name], flops[name], 0.0, None) for name, arm in timed.items()]
            ratios = _ratios(timed, seconds)
            cases.append(Case(name=name, arms=measured, equality=equality, ratios=ratios, threads=threads, clock=clock))
    return cases


def inference_threads(settings: MolexSettings) -> list[int]:
    """With how many CPU threads inference is timed: those asked for that this machine has cores for."""
    if settings.device != "cpu":
        return [settings.threads]
    return [threads for threads in settings.inference_threads if threads <= (os.cpu_count() or 1)]


def _inference(model: nn.Module, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        model.eval()
        with torch.no_grad():
            forward(model, batch)

    return run


def _tensors(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The output, in evaluation and in training, and the gradients of the LoRAs and routers, by their order."""
    with torch.no_grad():
        evaluated = forward(model.eval(), batch)
    with collect_losses():  # not attached, as the published form has no balance loss in this comparison
        output = forward(model.train(), batch)
    loss(output, batch).backward()
    tensors = {"output": torch.stack([evaluated, output.detach()])}
    for at, (down, up) in enumerate(loras(model)):
        tensors |= {
            f"the gradient of A in LoRA {at}": _gradient(down),
            f"the gradient of B in LoRA {at}": _gradient(up),
        }
    for at, router in enumerate(_linear_routers(model)):
        tensors |= {f"the gradient of the {part} of router {at}": _gradient(p) for part, p in router.items()}
    model.zero_grad(set_to_none=True)
    return tensors


def _linear_routers(model: nn.Module) -> Sequence[dict[str, Tensor]]:
    """Weight ``(T, in)`` and bias ``(T,)`` of the router in each block."""
    ours = [router for _, router in routers(model)]
    naive = [block.router for block in model.modules() if isinstance(block, NaiveMolexBlock)]
    return [dict(router.named_parameters()) for router in [*ours, *naive]]


def _gradient(parameter: Tensor) -> Tensor:
    # Where the loss does not depend on a parameter, no gradient and one of zeros mean the same.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _ratios(arms: Mapping[str, MolexArm], seconds: Mapping[str, Sequence[float]]) -> list[Ratio]:
    pairs = [(name, "lora") for name in arms if name != "lora"]
    pairs += [(name, EXACT) for name in arms if name.endswith("guests")]
    (naive,) = (name for name in arms if name.startswith("naive"))
    pairs.append((naive, naive.replace("naive", "molex")))
    return [ratio(seconds, arm, over) for arm, over in pairs]


def _arm(name: str, arm: MolexArm, seconds: list[float], flops: int, kept: float, peak: float | None) -> Arm:
    parameters = trainable_parameters(arm.model)
    return Arm.of(name, arm.what, seconds, parameters, kept, peak, flops, block_runs=float(arm.rows))
