"""The arms of the train-step benchmark, all made from one frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertModel

from lamella.lab.bench.encoder import Batch, build_encoder, forward, loss, pass_gradients_to_embeddings, twin
from lamella.lab.bench.naive import naive_copy
from lamella.lab.bench.settings import MolaSettings
from lamella.lab.methods import trainable_parameters
from lamella.lab.studies.measuring import kept_megabytes
from lamella.tuners import MolaConfig

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Trained:
    """A model to be timed, and what it is in words."""

    model: nn.Module
    what: str


def build_arms(settings: MolaSettings) -> dict[str, Trained]:
    """The five arms, in float32 on the CPU; ``naive`` has the weights of ``mola balance off``.

    They share the frozen weights, so that a change of one arm's device or precision is a change of all.
    """
    base = build_encoder(settings.hidden, settings.layers)
    unbalanced = _mola(base, settings, router_aux_loss_coef=0.0)
    balanced = _mola(base, settings, router_aux_loss_coef=MolaConfig.router_aux_loss_coef)
    target = trainable_parameters(balanced)
    rank = _rank_nearest(target, settings)
    lora = get_peft_model(twin(base), _lora_config(rank))
    frozen = twin(base)
    pass_gradients_to_embeddings(frozen)
    mixture = f"lamella's MoLA {settings.num_experts}, r={settings.r}, top-{settings.top_k}"
    return {
        "frozen": Trained(frozen, "the base, gradients flowing through every layer to the embeddings"),
        "lora": Trained(lora, f"PEFT LoRA of rank {rank}, the nearest to MoLA's {target:,} trainable parameters"),
        "mola": Trained(balanced, f"{mixture}, balance loss {MolaConfig.router_aux_loss_coef:g}"),
        "mola balance off": Trained(unbalanced, f"{mixture}, no balance loss"),
        "naive": Trained(
            naive_copy(base, unbalanced), "the published loop over experts, same weights, no balance loss"
        ),
    }


def train_step(model: nn.Module, batch: Batch, learning_rate: float = LEARNING_RATE) -> Callable[[], None]:
    """Forward, backward, AdamW (fused, the Trainer's default) and zero_grad(set_to_none)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True) if trained else None

    def step() -> None:
        loss(forward(model, batch), batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def steps_of(arms: Mapping[str, Trained], batch: Batch) -> dict[str, Callable[[], None]]:
    """Each arm's train step on the same batch."""
    return {name: train_step(arm.model, batch) for name, arm in arms.items()}


def kept_by_step(model: nn.Module, batch: Batch) -> float:
    """Megabytes of activations that a train step keeps for its backward pass."""
    given = [*model.parameters(), *model.buffers(), batch.input_ids, batch.attention_mask, batch.target]
    return kept_megabytes(lambda: loss(forward(model, batch), batch), given)


def _mola(base: BertModel, settings: MolaSettings, router_aux_loss_coef: float) -> PeftModel:
    # B at random: with B zero the routers would get no gradient, and equality would compare zeros
    config = MolaConfig(
        r=settings.r, num_experts=settings.num_experts, top_k=settings.top_k, lora_dropout=settings.dropout,
        router_aux_loss_coef=router_aux_loss_coef, init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(twin(base), config)


def _lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")


def _rank_nearest(target: int, settings: MolaSettings) -> int:
    """LoRA's parameters are proportional to its rank: those of rank 1 say which rank comes nearest."""
    with torch.device("meta"):
        encoder = build_encoder(settings.hidden, settings.layers)
    return max(1, round(target / trainable_parameters(get_peft_model(encoder, _lora_config(1)))))
