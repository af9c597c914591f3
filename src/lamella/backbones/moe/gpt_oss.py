"""GPT-OSS."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.expert import Activation, Expert
from lamella.backbones.moe.family import register
from lamella.backbones.moe.granite import GraniteMoe


@register
class GptOss(GraniteMoe):
    """Routes as Granite-MoE does; its experts have biases, and lie transposed, gate and up by turns."""

    sparse: ClassVar = ("GptOssMLP",)

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        experts: Any = self.experts(sparse)
        both, bias = experts.gate_up_proj[index], experts.gate_up_proj_bias[index]  # (h, 2*ff), (2*ff,)
        return Expert(
            up=both[:, 1::2].t(),
            down=experts.down_proj[index].t(),
            activation=_clamped(experts.alpha, experts.limit),
            gate=both[:, ::2].t(),
            gate_bias=bias[::2],
            up_bias=bias[1::2],
            down_bias=experts.down_proj_bias[index],
        )


def _clamped(alpha: float, limit: float) -> Activation:
    """``(up + 1) * gate * sigmoid(alpha * gate)``, gate clamped above, up on both sides."""

    def hidden(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(gate * alpha)

    return hidden
