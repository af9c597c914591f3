"""The hidden units of an expert, from what its gate and up put out, with the way back."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from lamella.backbones.moe import Expert
from lamella.backbones.moe.family import Gated
from lamella.similarity.alignment.buffers import Buffers

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
