"""The routed layers of a model, as checks see them, and what goes into and comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones import Place
from lamella.tuners.mola import MolaLinear
from lamella.tuners.mole.layer import MoleLinear
from lamella.tuners.molex.block import MolexBlock

# A prime number of tokens: k choices of each can never fall evenly on N experts unless k is N, so that the balance loss
# of a healthy router always has a gradient.
_PRIMES = (31, 23, 13, 7)


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """One router with the experts it chooses from, for one active adapter.

    Attributes:
        module: the layer; of MOLE, the one that holds its unit's router.
        name: dotted name of what is decided for: the layer, or MOLE's unit.
        place: where that lies.
        adapter: the adapter's name.
        config: the adapter's config.
        router: decides.
        num_experts: N, of MoLEx the candidates.
        top_k: k.
        factors: of MoLA's experts ``A (N, r, in)`` and ``B (N, out, r)``; none where the experts are there already.
    """

    module: MolaLinear | MolexBlock | MoleLinear
    name: str
    place: Place
    adapter: str
    config: Any
    router: nn.Module
    num_experts: int
    top_k: int
    factors: tuple[nn.Parameter, ...] = ()

    @property
    def key(self) -> tuple[str, int, str]:
        """Stack, block and module, as in a trace's frame."""
        return self.place.stack, self.place.layer, self.place.module

    @property
    def chooses_blocks(self) -> bool:
        """Whether the experts are whole pretrained blocks."""
        return isinstance(self.module, MolexBlock)

    @property
    def learns(self) -> bool:
        """Whether the adapter's config lets any loss reach the router."""
        return bool(getattr(self.config, "trains_router", True))

    @property
    def has_own_loss(self) -> bool:
        """Whether the adapter's config asks for a balance or z-loss."""
        balances = self.config.balance_coef > 0 and getattr(self.config, "balance", "") != "none"
        return bool(balances or getattr(self.config, "z_coef", 0) > 0)

    @property
    def own_loss(self) -> str:
        """What its own loss is called where losses are collected."""
        is_one_of_all = getattr(self.config, "balance", "") == "log"
        return f"log balance of {self.adapter}" if is_one_of_all else self.name

    @property
    def own_loss_may_be_zero(self) -> bool:
        """Whether its balance loss is 0 where all experts count alike: how far the entropy is below its maximum."""
        return getattr(self.config, "balance", "") == "entropy"

    @property
    def own_loss_is_flat(self) -> bool:
        """Whether its balance loss is the same wherever it sends its tokens: with k = N every expert gets them all."""
        counts = not hasattr(self.config, "balance")  # MOLE's are of the weights
        return counts and self.top_k == self.num_experts and not getattr(self.config, "z_coef", 0)

    @property
    def untrained(self) -> bool:
        """Whether B is zero still, so that the experts do nothing."""
        return bool(self.factors) and not bool(self.factors[-1].detach().any())


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Every router of the active adapters, in the order of the modules."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    return [
        _routed(module, adapter, configs[adapter])
        for module in model.modules()
        if isinstance(module, MolaLinear | MolexBlock | MoleLinear)
        for adapter in module.active_adapters
        if _decides(module, adapter)
    ]


def _decides(module: MolaLinear | MolexBlock | MoleLinear, adapter: str) -> bool:
    if isinstance(module, MoleLinear):
        return adapter in module.lamella_mole_router
    return module.routed(adapter)


def _routed(module: MolaLinear | MolexBlock | MoleLinear, adapter: str, config: Any) -> RoutedLayer:
    if isinstance(module, MoleLinear):
        unit, count = module.units[adapter], len(module.units[adapter].names)
        return RoutedLayer(module, unit.name, unit.place, adapter, config, unit.router, count, count)
    where = (module, module.name, module.place, adapter, config)
    if isinstance(module, MolexBlock):
        depth = module.mixtures[adapter].depth
        return RoutedLayer(*where, module.router(adapter), len(depth.candidates), depth.top_k)
    experts = module.experts[adapter]
    factors = (module.lamella_mola_lora_A[adapter], module.lamella_mola_lora_B[adapter])
    return RoutedLayer(*where, module.lamella_mola_router[adapter], experts.num_experts, experts.top_k, factors)


def transformer(model: nn.Module) -> Any:
    """The model inside PEFT's wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter lies."""
    return next(model.parameters()).device


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors moved."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def longest_input(model: nn.Module) -> int | None:
    """Positions the model has; None where it does not say."""
    config = getattr(transformer(model), "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(limit := getattr(config, name, None), int):
            return limit - 2  # RoBERTa's kin keep two for themselves
    return None


def random_batch(model: nn.Module, seed: int = 0) -> dict[str, Tensor] | None:
    """One row of random token ids, the same for a seed; None for a model that takes something else than token ids."""
    inner = transformer(model)
    config = getattr(inner, "config", None)
    embeddings = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    if getattr(inner, "main_input_name", None) != "input_ids" or not isinstance(embeddings, nn.Embedding):
        return None
    limit = longest_input(model) or _PRIMES[0]
    tokens = next((prime for prime in _PRIMES if prime <= limit), 1)
    ids = torch.randint(embeddings.num_embeddings, (1, tokens), generator=torch.Generator().manual_seed(seed))
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < embeddings.num_embeddings:
        ids = ids.masked_fill(ids == pad, (pad + 1) % embeddings.num_embeddings)
    if "MultipleChoice" in type(inner).__name__:
        ids = ids[:, None]  # (1, one choice, tokens)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids.flip(-1)
    return to_device(batch, device_of(model))


def values_of(output: Any) -> Tensor:
    """The logits, or the hidden states of a model without a head."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim())


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or the mean square of its outputs where the batch has no labels; a scalar."""
    loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else values_of(output).float().square().mean()
