"""An expert that is only passed through: gradients flow to what it was given, none is computed for its weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lamella.backbones.moe import Expert
from lamella.similarity.alignment.buffers import Buffers
from lamella.similarity.alignment.hidden_units import hidden_units


class FrozenExpert:
    """Forward and backward of one expert; its weights are held once, in the dtype asked.

    What either returns lies in memory that the next call writes to.
    """

    @torch.no_grad()
    def __init__(self, expert: Expert, dtype: torch.dtype) -> None:
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
