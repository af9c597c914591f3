"""The models of MoLEx's benchmark, all made from one frozen encoder, with routers that decide as they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import BertModel
from typing_extensions import Self

from benchmarks.encoder import SEQUENCE, Batch, EncoderSettings, clone, forward
from benchmarks.naive_molex import copy_loras, naive_molex_copy
from lamella.errors import LamellaError
from lamella.routing import Router
from lamella.tuners.molex import MolexBlock, MolexConfig

EXACT = "molex p=0"
BF16 = f"{EXACT}, bf16 guest"
RECOMPUTED = f"{EXACT}, recomputed"

# Decides without saturating the softmax, so that every router has a gradient to compare.
_BIAS = 2.0


# A batch whose sequences disagree is timed with up to this many different guests in every block.
MOST_GUESTS = 4
_GUESTS = (2, MOST_GUESTS)


class MolexSettings(EncoderSettings):
    """One guest in every block, LoRA of rank r on query and value inside the blocks.

    Inference is timed for each number of sequences in ``inference_batches`` with each of ``inference_threads`` that the
    machine has cores for.
    """

    layers: int = Field(12, ge=MOST_GUESTS + 1)
    alpha: float = Field(0.95, gt=0, lt=1)
    inference_batches: tuple[PositiveInt, ...] = (1, 32)
    inference_threads: tuple[PositiveInt, ...] = (1, 2)

    @model_validator(mode="after")
    def _sequences_can_disagree(self) -> Self:
        if self.tokens < MOST_GUESTS * SEQUENCE:
            raise LamellaError(
                f"tokens={self.tokens} are fewer than {MOST_GUESTS} rows of {SEQUENCE}, whose sequences could choose "
                f"{MOST_GUESTS} different guests; use at least {MOST_GUESTS * SEQUENCE}."
            )
        return self


@dataclass(frozen=True)
class MolexModel:
    """A model to be timed, and what its routers are to decide.

    Attributes:
        model: to be timed.
        what: what it is, in words.
        rows: how often a sequence runs through a block, per block: 2 - p where a share p of them choose themselves.
        calls: how often a block is called, per block: once more for each further guest that a batch chose.
    """

    model: nn.Module
    what: str
    rows: Fraction
    calls: Fraction


def build_models(settings: MolexSettings, base: BertModel, batch: Batch) -> dict[str, MolexModel]:
    """All of them, in float32 on the CPU, with the same frozen weights and equal LoRAs.

    Args:
        settings: of the benchmark.
        base: the frozen encoder.
        batch: on which the sequences of some are to disagree.
    """
    lora = get_peft_model(clone(base), _lora_config(settings, init=False))
    one, two = Fraction(1), Fraction(2)
    what = f"PEFT LoRA of rank {settings.r} on query and value, as in all of them"
    models = {"lora": MolexModel(lora, what, one, one)}
    for count in self_counts(settings.layers):
        p = Fraction(count, settings.layers)
        what = _in_words(count, settings.layers)
        models[f"molex p={p}"] = MolexModel(agreeing(settings, base, lora, count), what, two - p, two - p)
    cast = agreeing(settings, base, lora, 0, guest_dtype="bfloat16")
    models[BF16] = MolexModel(cast, "guest_dtype='bfloat16', inexact", two, two)
    recomputed = agreeing(settings, base, lora, 0, recompute_guest=True)
    models[RECOMPUTED] = MolexModel(recomputed, "recompute_guest=True", two, two)
    for guests in _GUESTS:
        what = f"no block chooses itself, the sequences of a batch choose {guests} different guests"
        models[_of_guests(guests)] = MolexModel(molex(settings, base, lora), what, two, Fraction(1 + guests))
    disagree_on(batch, models)
    half = Fraction(settings.layers // 2, settings.layers)
    published = naive_molex_copy(base, agreeing(settings, base, lora, settings.layers // 2))
    what = f"the published form, decisions of p={half}: both blocks always run"
    models[f"naive p={half}"] = MolexModel(published, what, two, two)
    return models


def self_counts(layers: int) -> list[int]:
    """In how many blocks the guest is the block itself, for each model: none, one, half of them, all."""
    return [0, 1, layers // 2, layers]


def agreeing(settings: MolexSettings, base: BertModel, lora: PeftModel, alone: int, **changes: Any) -> PeftModel:
    """MoLEx whose routers choose for every sequence the same: themselves in ``alone`` blocks, else the next block."""
    model = molex(settings, base, lora, **changes)
    layers = settings.layers
    for block, router in routers(model):
        at = block.place.layer
        chooses_itself = (at + 1) * alone // layers > at * alone // layers  # spread evenly over the depth
        with torch.no_grad():
            router.weight.zero_()
            _bias_of(router).zero_()[at if chooses_itself else (at + 1) % layers] = _BIAS
    return model


def disagree_on(batch: Batch, models: Mapping[str, MolexModel]) -> None:
    """Lets the sequences of a batch disagree in those models in which they are to."""
    for guests in _GUESTS:
        disagree(models[_of_guests(guests)].model, batch, guests)


def disagree(model: PeftModel, batch: Batch, guests: int) -> None:
    """Sets routers so that the sequences of a batch choose ``guests`` different blocks in turn, never the block itself.

    A forward runs through the blocks and sets each router when its input is there: to the least weights that give the
    mean token of each sequence a logit of 1 for its guest and 0 for the others.
    """
    sequence = torch.arange(len(batch.input_ids))
    handles = [
        block.register_forward_pre_hook(lambda block, args: _choose(block, args[0], sequence % guests))
        for block, _ in routers(model)
    ]
    try:
        with torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def molex(settings: MolexSettings, base: BertModel, lora: PeftModel, **changes: Any) -> PeftModel:
    """MoLEx around a clone of ``base``, a linear router in every block, with the weights of ``lora`` inside.

    Args:
        settings: of the benchmark.
        base: the frozen encoder.
        lora: a plain LoRA on it.
        changes: settings of MolexConfig.
    """
    inside = _lora_config(settings, init=True)
    config = MolexConfig(**{"alpha": settings.alpha, "router_scope": "per-layer", "lora": inside, **changes})
    model = get_peft_model(clone(base), config)
    copy_loras(lora, model)
    return model


def routers(model: nn.Module) -> list[tuple[MolexBlock, Router]]:
    """The MoLEx blocks of a model with the routers that decide there."""
    blocks = [block for block in model.modules() if isinstance(block, MolexBlock)]
    return [(block, block.router(adapter)) for block in blocks for adapter in block.routers]


@torch.no_grad()
def _choose(block: nn.Module, h: Tensor, group: Tensor) -> None:
    """Sets a router so that each sequence of ``h (batch, tokens, features)`` chooses the guest of its group."""
    assert isinstance(block, MolexBlock)
    (router,) = (block.router(adapter) for adapter in block.routers)
    chosen = torch.nn.functional.one_hot(group).to(h.dtype)  # (batch, guests)
    guests = [(block.place.layer + 1 + at) % len(block.blocks) for at in range(chosen.shape[1])]
    router.weight.zero_()[guests] = (torch.linalg.pinv(h.mean(dim=1)) @ chosen).t()
    _bias_of(router).zero_()[guests] = _BIAS


def _of_guests(guests: int) -> str:
    return f"{EXACT}, {guests} guests"


def _bias_of(router: Router) -> Tensor:
    assert router.bias is not None  # MoLEx's linear router has one
    return router.bias


def _lora_config(settings: MolexSettings, init: bool) -> LoraConfig:
    # B at random where weights begin: with B zero, A would get no gradient to compare
    return LoraConfig(
        r=settings.r, lora_alpha=2 * settings.r, lora_dropout=settings.dropout, target_modules=["query", "value"],
        init_lora_weights=init,
    )  # fmt: skip


def _in_words(alone: int, layers: int) -> str:
    if alone == 0:
        return "lamella's MoLEx, no block chooses itself"
    if alone == layers:
        return "every block chooses itself: LoRA's work, with routers"
    return f"{alone} of {layers} blocks choose{'s itself' if alone == 1 else ' themselves'}"
