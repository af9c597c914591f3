"""An expert that is only passed through: gradients flow to what it was given, none is computed for its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from lamella.backbones.moe import Expert
from lamella.backbones.moe.expert import Gated, NormedExpert
from lamella.errors import LamellaError


class FrozenExpert:
    """Forward and backward of one expert; its weights are held once, in the dtype asked.

    What either returns lies in memory that the next call writes to.
    """

    @torch.no_grad()
    def __init__(self, expert: Expert, dtype: torch.dtype) -> None:
        if isinstance(expert, NormedExpert):
            raise LamellaError("An expert whose output is normalised is more than its matrices, and is not aligned to.")
        self._expert = with_matrices(expert, {name: one.detach().to(dtype) for name, one in expert.matrices.items()})
        self._units = hidden_units(self._expert)
        self._buffers = Buffers()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The output ``(N, out)`` for ``x (N, in)``."""
        expert = self._expert
        gate = None if expert.gate is None else self._linear("gate", x, expert.gate, expert.gate_bias)
        up = self._linear("up", x, expert.up, expert.up_bias)
        return self._linear("output", self._units.forward(gate, up), expert.down, expert.down_bias)

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient ``(N, in)`` at the last ``forward``'s input, from the one ``(N, out)`` at its output."""
        expert = self._expert
        size = len(gradient), expert.up.shape[0]
        at_hidden = torch.mm(gradient, expert.down, out=self._buffers.take("at_hidden", gradient, *size))
        *at_gate, at_up = self._units.backward(at_hidden)
        # the gradient at the output, which may lie in the same memory, has been used by now
        at_input = self._buffers.take("output", gradient, len(gradient), expert.up.shape[1])
        torch.mm(at_up, expert.up, out=at_input)
        if expert.gate is not None:
            at_input.addmm_(at_gate[0], expert.gate)
        return at_input

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = self._buffers.take(name, x, len(x), len(weight))
        return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def with_matrices(expert: Expert, matrices: Mapping[str, Tensor]) -> Expert:
    """The expert with these in place of its own, by name."""
    changes: dict[str, Any] = dict(matrices)
    return replace(expert, **changes)


_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class HiddenUnits:
    """Any activation, by autograd."""

    def __init__(self, expert: Expert) -> None:
        self._activation = expert.activation

    def forward(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The hidden units ``(N, ff)``; the arguments are kept for ``backward``."""
        with torch.enable_grad():
            self._given = [one.requires_grad_() for one in (gate, up) if one is not None]
            self._hidden = self._activation(gate, up)
        return self._hidden.detach()

    def backward(self, gradient: Tensor) -> list[Tensor]:
        """Gradients at gate (where there is one) and up, ``(N, ff)`` each; ``gradient`` may be overwritten."""
        return list(torch.autograd.grad(self._hidden, self._given, gradient))


class Swiglu(HiddenUnits):
    """``silu(gate) * up``, which most families have, without fresh memory at every step."""

    def __init__(self, expert: Expert) -> None:
        super().__init__(expert)
        self._buffers = Buffers()

    def forward(self, gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        self._gate, self._up = gate, up
        self._silu = torch.ops.aten.silu.out(gate, out=self._buffers.take("silu", up, *up.shape))
        return torch.mul(self._silu, up, out=self._buffers.take("hidden", up, *up.shape))

    def backward(self, gradient: Tensor) -> list[Tensor]:
        at_up = self._silu.mul_(gradient)
        at_silu = gradient.mul_(self._up)
        return [torch.ops.aten.silu_backward.grad_input(at_silu, self._gate, grad_input=self._gate), at_up]


def hidden_units(expert: Expert) -> HiddenUnits:
    """The hidden units of an expert, in the fastest form there is for its activation."""
    activation = expert.activation.activation if isinstance(expert.activation, Gated) else None
    return Swiglu(expert) if activation is silu or isinstance(activation, _SILU) else HiddenUnits(expert)


class Buffers:
    """Named tensors to write to; each is made once and again when a larger one is asked for."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A contiguous tensor of this shape, with ``like``'s dtype and device; what was written before is lost."""
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(shape)
