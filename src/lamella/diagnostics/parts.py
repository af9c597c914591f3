"""What goes into a model that is examined, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# A prime number of tokens: k choices of each can never fall evenly on N experts unless k is N, so that the balance loss
# of a healthy router always has a gradient.
_PRIMES = (31, 23, 13, 7)


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
