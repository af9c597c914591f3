"""Running a model that is examined: its batches and outputs, without leaving a trace on it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

# A prime number of tokens: k choices of each can never fall evenly on N experts unless k is N, so that the balance loss
# of a healthy router always has a gradient.
_PRIMES = (31, 23, 13, 7)

M = TypeVar("M", bound=nn.Module)


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Afterwards gradients, buffers, training modes and all random states are what they were before, bit for bit."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is off inside: a reentrant one hides losses that are collected."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for block in blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = True  # type: ignore[assignment]


def clone(model: M, *, on_meta: bool = False) -> M:
    """A copy whose modules may be replaced and re-marked at will, on the same memory, or on none (``on_meta``).

    Its weights are those of ``model``: read them, do not write them. Buffers are copied.
    """
    shared: dict[int, object] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            data = parameter.data.to("meta") if on_meta else parameter.data
            shared[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        else:  # a quantised weight: its class knows how to be used, not how to be made again
            shared[id(parameter)] = parameter
    if on_meta:
        shared |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, shared)


def base_of(model: PeftModel) -> nn.Module:
    """Takes the adapters out of a model, or of a clone of it, and gives the base."""
    base: nn.Module = model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config  # PEFT would take it for another adapter
    return base


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
