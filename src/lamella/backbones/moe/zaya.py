"""Zaya."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.contract import Contract
from lamella.backbones.moe.family import NativeRouting, bare, register
from lamella.errors import LamellaError


@register
class Zaya(Contract):
    """A token may choose to skip the layer, by a logit after those of the experts; it then counts for no expert."""

    sparse: ClassVar = ("ZayaSparseMoeBlock",)

    def columns(self, sparse: nn.Module) -> int:
        return self.num_experts(sparse) + 1

    def route(self, sparse: nn.Module, x: Tensor) -> NativeRouting:
        """The router's decision.

        Raises:
            LamellaError: it reads what the router before it made of the tokens.
        """
        if bare(self.router(sparse)).use_eda:
            raise LamellaError(
                "This ZayaRouter reads what the router before it made of the tokens, so hidden states alone do not say "
                "what it decides; watch it in the model (record_routing)."
            )
        return super().route(sparse, x)

    def read(self, sparse: nn.Module, output: Any, selected: Tensor, weights: Tensor) -> NativeRouting:
        routing = super().read(sparse, (output[0][:, :-1],), selected, weights)
        skipped = weights == 0  # index and weight are 0 then
        return replace(routing, kept=~skipped, skipped=skipped)
