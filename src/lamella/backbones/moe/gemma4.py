"""Gemma 4 and DiffusionGemma."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.contract import Contract
from lamella.backbones.moe.family import NativeRouting, bare, register, widen


@register
class Gemma4(Contract):
    """Router and experts lie in the block itself, and each is given the block's states behind a norm of its own.

    The router puts out probabilities; a token's experts are weighted by a scale of each expert too.
    """

    sparse: ClassVar = ("Gemma4TextDecoderLayer", "DiffusionGemmaEncoderTextLayer", "DiffusionGemmaDecoderTextLayer")

    def top_k(self, sparse: nn.Module) -> int:
        return int(bare(self.router(sparse)).config.top_k_experts)

    def shared(self, sparse: nn.Module) -> None:
        return None

    def route(self, sparse: nn.Module, x: Tensor) -> NativeRouting:
        output: Any = self.router(sparse)(x.reshape(-1, x.shape[-1]))
        return self.read(sparse, output, *self.handed(sparse, output))

    def read(self, sparse: nn.Module, output: Any, selected: Tensor, weights: Tensor) -> NativeRouting:
        return super().read(sparse, (widen(output[0]).log(),), selected, weights)
