"""DeepSeek-V4."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from lamella.backbones.moe.contract import Contract
from lamella.backbones.moe.family import NativeRouting, register
from lamella.errors import LamellaError


@register
class DeepseekV4(Contract):
    """The first layers look a token's experts up by the token itself; their router weighs them, and chooses none."""

    sparse: ClassVar = ("DeepseekV4SparseMoeBlock",)

    def shared(self, sparse: nn.Module) -> Callable[[Tensor], Tensor] | None:
        block: Any = sparse
        return lambda x: block.shared_experts(x)  # (N, h)

    def route(self, sparse: nn.Module, x: Tensor) -> NativeRouting:
        _refuse_hashed(sparse, "hidden states alone do not say which")
        return super().route(sparse, x)

    def masked(self, sparse: nn.Module, experts: Collection[int]) -> AbstractContextManager[None]:
        _refuse_hashed(sparse, "none can be masked; replace the expert instead")
        return super().masked(sparse, experts)


def _refuse_hashed(sparse: Any, so: str) -> None:
    if sparse.is_hash:
        raise LamellaError(f"This {type(sparse).__name__} looks experts up by the ids of tokens, so {so}.")
