"""MoLEx beside plain LoRA of the same rank, in training and in inference, and beside its published form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertLayer

from benchmarks.encoder import (
    SEQUENCE,
    Batch,
    build_batch,
    build_encoder,
    forward,
    kept_by_step,
    loss,
    train_step,
)
from benchmarks.equality import Equality, compare, worst_of
from benchmarks.measure import Timed, count_block_runs, measure_case
from benchmarks.molex_models import (
    BF16,
    EXACT,
    MOST_GUESTS,
    RECOMPUTED,
    MolexModel,
    MolexSettings,
    build_models,
    disagree_on,
    molex,
    routers,
)
from benchmarks.naive_molex import NaiveMolexBlock, loras, naive_molex_copy
from benchmarks.record import Benchmark, Case, Record, Say, Target
from lamella.errors import LamellaError
from lamella.lab.methods import trainable_parameters
from lamella.routing import collect_losses

# What MoLEx is measured against, times plain LoRA of the same rank: an exact train step per block run, one whose guests
# run in bfloat16, and the activations kept when guests are recomputed.
_MOST_TIME_PER_RUN = 1.05
_MOST_TIME_BF16 = 1.6
_MOST_KEPT_RECOMPUTED = 1.25
# Of each sequence, in float64: more would show no more and take longer than all that is timed.
_TOKENS_COMPARED = 32


def run(settings: MolexSettings, say: Say) -> list[Case]:
    """Compares outputs and gradients, then times the train step and inference, each in interleaved runs.

    Raises:
        LamellaError: MoLEx differs from its published form, or from LoRA at alpha=1, or its routers decide otherwise
            than they were set to.
    """
    base = build_encoder(settings.hidden, settings.layers)
    batch = build_batch(settings.tokens, settings.hidden)
    few = batch.corner(MOST_GUESTS, _TOKENS_COMPARED)
    models = build_models(settings, base, few)
    say("comparing outputs and gradients in float64")
    equality = check_equality(settings, base, models, few)
    batch = batch.to(settings.device, settings.torch_dtype)
    disagree_on(batch, models)
    for one in models.values():
        one.model.to(settings.device, settings.torch_dtype)
    check_decisions(models, batch)
    say(f"timing train steps of {', '.join(models)}")
    # A learning rate of 0 does an optimizer's work and leaves every decision as it was checked.
    methods = {
        name: _timed(
            one, train_step(one.model.train(), batch, learning_rate=0.0), partial(kept_by_step, one.model, batch)
        )
        for name, one in models.items()
    }
    cases = [measure_case("train step", methods, _pairs(models), equality, settings)]
    # Only on the batch they were made for do sequences disagree; nothing is recomputed without a backward pass.
    agreeing = {name: one for name, one in models.items() if one.calls <= 2 and name != RECOMPUTED}
    for threads in inference_threads(settings):
        for rows in settings.inference_batches:
            cases.append(_inference_case(settings, agreeing, rows, threads, equality, say))
    return cases


def _inference_case(
    settings: MolexSettings, models: Mapping[str, MolexModel], rows: int, threads: int, equality: Equality, say: Say
) -> Case:
    batch = build_batch(rows * SEQUENCE, settings.hidden).to(settings.device, settings.torch_dtype)
    check_decisions(models, batch)
    name = f"batch {rows}, {threads} thread{'s' if threads > 1 else ''}"
    say(f"timing forwards, {name}")
    methods = {method: _timed(one, _inference(one.model, batch)) for method, one in models.items()}
    return measure_case(name, methods, _pairs(models), equality, settings, threads=threads)


def _timed(one: MolexModel, step: Callable[[], object], kept_mb: Callable[[], float] = lambda: 0.0) -> Timed:
    return Timed(one.what, step, trainable_parameters(one.model), kept_mb, block_runs=float(one.rows))


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    pairs = [(name, "lora") for name in names if name != "lora"]
    pairs += [(name, EXACT) for name in names if name.endswith("guests")]
    (naive,) = (name for name in names if name.startswith("naive"))
    return [*pairs, (naive, naive.replace("naive", "molex"))]


def inference_threads(settings: MolexSettings) -> list[int]:
    """With how many CPU threads inference is timed: those asked for that this machine has cores for."""
    if settings.device != "cpu":
        return [settings.threads]
    return [threads for threads in settings.inference_threads if threads <= (os.cpu_count() or 1)]


def _inference(model: nn.Module, batch: Batch) -> Callable[[], None]:
    def infer() -> None:
        model.eval()
        with torch.no_grad():
            forward(model, batch)

    return infer


def check_equality(
    settings: MolexSettings, base: BertModel, models: Mapping[str, MolexModel], batch: Batch
) -> Equality:
    """Compares, in float64, every MoLEx model with its naive form, and MoLEx of alpha=1 with plain LoRA.

    All are left in float64 on the settings' device, without gradients.

    Raises:
        LamellaError: two of them differ.
    """
    batch = batch.to(settings.device, torch.float64)
    lora = models["lora"].model
    assert isinstance(lora, PeftModel)
    pairs: list[tuple[nn.Module, nn.Module]] = [(molex(settings, base, lora, alpha=1), lora)]
    pairs += [
        (one.model, naive_molex_copy(base, one.model))
        for one in models.values()
        if isinstance(one.model, PeftModel) and routers(one.model)
    ]
    compared = []
    for ours, theirs in pairs:
        both = [model.to(settings.device, torch.float64) for model in (ours, theirs)]
        compared.append(compare(*(_tensors(model, batch) for model in both)))
    return worst_of(compared)


def check_decisions(models: Mapping[str, MolexModel], batch: Batch) -> None:
    """Counts the blocks that each model runs: only a decision that was taken as intended is timed as that.

    Raises:
        LamellaError: a model runs another number of blocks than its decisions ask for.
    """
    for name, one in models.items():
        blocks = [module for module in one.model.modules() if isinstance(module, BertLayer)]
        rows, calls = count_block_runs(_inference(one.model, batch), blocks, len(batch.input_ids))
        if abs(rows - one.rows) > 1e-9 or abs(calls - one.calls) > 1e-9:
            raise LamellaError(
                f"{name!r} was to run {float(one.rows):.3g} blocks per block and sequence in "
                f"{float(one.calls):.3g} calls, but ran {rows:.3g} in {calls:.3g}, so nothing was timed. "
                "This is a defect of lamella: please report it with the settings of this run."
            )


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
    ours = [router for _, router in routers(model)]
    naive = [block.router for block in model.modules() if isinstance(block, NaiveMolexBlock)]
    for at, router in enumerate([*ours, *naive]):
        named = router.named_parameters()  # weight (T, in), bias (T,)
        tensors |= {f"the gradient of the {part} of router {at}": _gradient(p) for part, p in named}
    model.zero_grad(set_to_none=True)
    return tensors


def _gradient(parameter: Tensor) -> Tensor:
    # Where the loss does not depend on a parameter, no gradient and one of zeros mean the same.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def targets(record: Record) -> Sequence[Target]:
    """The targets of the train step; how the forms relate beside."""
    case = record.cases[0]
    figures = [
        Target(
            f"train step, {method.name} / lora", case.ratio(method.name, "lora"), digits=3,
            most=_MOST_TIME_BF16 if method.name == BF16 else _MOST_TIME_PER_RUN * (method.block_runs or 1.0),
        )
        for method in case.methods
        if method.name.startswith("molex") and method.name != RECOMPUTED
    ]  # fmt: skip
    kept = case.method(RECOMPUTED).kept_mb / case.method("lora").kept_mb
    figures.append(Target(f"activations kept, {RECOMPUTED} / lora", kept, most=_MOST_KEPT_RECOMPUTED, digits=3))
    others = (ratio for ratio in case.ratios if ratio.over != "lora")
    return [*figures, *(Target(f"train step, {ratio.method} / {ratio.over}", ratio) for ratio in others)]


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"{settings['layers']} layers of {settings['hidden']}, r={settings['r']}, alpha={settings['alpha']}, "
        f"{settings['tokens']:,} tokens in rows of {SEQUENCE}, none of them padding"
    )


_QUICK = {
    "rounds": 2, "tokens": 512, "hidden": 32, "layers": 5, "inference_batches": (2,), "inference_threads": (1,),
}  # fmt: skip
MOLEX = Benchmark(MolexSettings, _QUICK, run, targets, shape, by_case="batch")
