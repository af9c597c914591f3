"""A train step with MoLA beside one with LoRA of equal size, the frozen base and the published loop over experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertModel

from benchmarks.encoder import (
    Batch,
    EncoderSettings,
    build_batch,
    build_encoder,
    clone,
    forward,
    kept_by_step,
    loss,
    pass_gradients_to_embeddings,
    train_step,
)
from benchmarks.equality import Equality, compare
from benchmarks.measure import Timed, measure_case
from benchmarks.naive_mola import NaiveMola, naive_copy
from benchmarks.record import Benchmark, Case, Record, Say, Target
from lamella.lab.methods import trainable_parameters
from lamella.routing import Router
from lamella.tuners import MolaConfig
from lamella.tuners.mola.layer import MolaLinear

_PAIRS = (
    *((method, "frozen") for method in ("lora", "mola", "mola balance off", "naive")),
    ("mola", "lora"),
    ("mola balance off", "lora"),
    ("naive", "mola"),
    ("naive", "mola balance off"),
)


class MolaSettings(EncoderSettings):
    """Experts 2-4-6-8 of rank r, top-k, on all linear modules of the blocks."""

    num_experts: Literal["2-4-6-8"] = "2-4-6-8"
    top_k: Literal[2] = 2


class Described(NamedTuple):
    """A model to be timed, and what it is in words."""

    model: nn.Module
    what: str


def run(settings: MolaSettings, say: Say) -> list[Case]:
    """Compares the outputs and gradients of MoLA and its naive form, then times all methods.

    Raises:
        LamellaError: MoLA and its naive form differ in float64.
    """
    models, batch = build_models(settings), build_batch(settings.tokens, settings.hidden)
    say("comparing outputs and gradients in float64")
    equality = check_equality(models["mola balance off"].model, models["naive"].model, batch, settings.device)
    batch = batch.to(settings.device, settings.torch_dtype)
    methods = {}
    for name, (model, what) in models.items():
        model.to(settings.device, settings.torch_dtype)
        kept = partial(kept_by_step, model, batch)
        methods[name] = Timed(what, train_step(model, batch), trainable_parameters(model), kept)
    say(f"timing {', '.join(methods)}")
    return [measure_case("train step", methods, _PAIRS, equality, settings)]


def build_models(settings: MolaSettings) -> dict[str, Described]:
    """The five methods, in float32 on the CPU; ``naive`` has the weights of ``mola balance off``.

    They share the frozen weights, so that a change of one's device or precision is a change of all.
    """
    base = build_encoder(settings.hidden, settings.layers)
    unbalanced = _mola(base, settings, balance=0.0)
    balanced = _mola(base, settings, balance=MolaConfig.router_aux_loss_coef)
    target = trainable_parameters(balanced)
    rank = _rank_nearest(target, settings)
    frozen = clone(base)
    pass_gradients_to_embeddings(frozen)
    mixture = f"lamella's MoLA {settings.num_experts}, r={settings.r}, top-{settings.top_k}"
    return {
        "frozen": Described(frozen, "the base, gradients flowing through every layer to the embeddings"),
        "lora": Described(
            get_peft_model(clone(base), _lora_config(rank)),
            f"PEFT LoRA of rank {rank}, the nearest to MoLA's {target:,} trainable parameters",
        ),
        "mola": Described(balanced, f"{mixture}, balance loss {MolaConfig.router_aux_loss_coef:g}"),
        "mola balance off": Described(unbalanced, f"{mixture}, no balance loss"),
        "naive": Described(
            naive_copy(base, unbalanced), "the published loop over experts, same weights, no balance loss"
        ),
    }


def _mola(base: BertModel, settings: MolaSettings, balance: float) -> PeftModel:
    # B at random: with B zero the routers would get no gradient, and equality would compare zeros
    config = MolaConfig(
        r=settings.r, num_experts=settings.num_experts, top_k=settings.top_k, lora_dropout=settings.dropout,
        router_aux_loss_coef=balance, init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(clone(base), config)


def _lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")


def _rank_nearest(target: int, settings: MolaSettings) -> int:
    """LoRA's parameters are proportional to its rank: those of rank 1 say which rank comes nearest."""
    with torch.device("meta"):
        encoder = build_encoder(settings.hidden, settings.layers)
    return max(1, round(target / trainable_parameters(get_peft_model(encoder, _lora_config(1)))))


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
    A, B = layer.factors(adapter)
    tensors = {"A": A, "B": B, "router": router.weight}
    return {part: tensor.grad for part, tensor in tensors.items() if tensor.grad is not None}


def targets(record: Record) -> Sequence[Target]:
    """Time and activations beside LoRA of equal size, and the gain over the published loop."""
    (case,) = record.cases
    return (
        Target("train step, mola / lora", case.ratio("mola", "lora"), most=1.00),
        Target("activations kept, mola / lora", case.method("mola").kept_mb / case.method("lora").kept_mb, most=1.05),
        Target("train step, naive / mola", case.ratio("naive", "mola"), least=1.5),
        Target("the same, neither with a balance loss", case.ratio("naive", "mola balance off")),
    )


def shape(settings: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"{settings['layers']} layers of {settings['hidden']}, r={settings['r']}, top-{settings['top_k']}, "
        f"{settings['tokens']:,} tokens, none of them padding"
    )


MOLA = Benchmark(MolaSettings, {"rounds": 2, "tokens": 32, "hidden": 32, "layers": 4}, run, targets, shape)
