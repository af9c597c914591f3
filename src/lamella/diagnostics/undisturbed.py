"""Running a model without leaving a trace on it, and copies of it that share its memory."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
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


def twin(model: M, *, on_meta: bool = False) -> M:
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
