"""Llama 4."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.expert import Expert, Gated
from lamella.backbones.moe.family import Callables, MoEFamily, NativeRouting, register, widen
from lamella.backbones.moe.interventions import put
from lamella.errors import LamellaError


@register
class Llama4(MoEFamily):
    """A token is scaled by its score before its one expert reads it; what the expert puts out is not weighted.

    So the tokens of a dispatch are the scaled ones, and all weights are 1. Every expert is run on every token, those
    that are not its own being zero. The published models choose one expert for each token.
    """

    sparse: ClassVar = ("Llama4TextMoe",)
    pools: ClassVar = False

    def of(self, sparse: nn.Module) -> "Llama4":
        """The family.

        Raises:
            LamellaError: a token gets several experts.
        """
        if (top_k := self.top_k(sparse)) > 1:
            raise LamellaError(
                f"This Llama4TextMoe gives each token {top_k} experts, and each of them another multiple of the token; "
                "lamella reads those that give it one (num_experts_per_tok=1), as the published ones do."
            )
        return self

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        experts: Any = self.experts(sparse)
        gate, up = experts.gate_up_proj[index].t().chunk(2)  # (ff, h) each
        return Expert(up, experts.down_proj[index].t(), Gated(experts.act_fn), gate)

    @contextmanager
    def watched(self, sparse: nn.Module, tell: Callable[[Tensor, NativeRouting], None]) -> Iterator[None]:
        scored: list[Tensor] = []

        def score(_: nn.Module, args: Any, output: Any) -> None:
            scored[:] = [output[1]]  # logits (N, E)

        def see(_: nn.Module, args: Any) -> None:
            with torch.no_grad():
                logits = widen(scored[0])
                indices = logits.argmax(dim=-1, keepdim=True)  # (N, 1)
                of_experts = args[0].detach().view(logits.shape[1], len(logits), -1)  # (E, N, h)
                x = of_experts[indices[:, 0], torch.arange(len(logits), device=logits.device)]  # (N, h)
                tell(x, NativeRouting(logits, torch.ones_like(indices, dtype=logits.dtype), indices))

        router, experts = self.router(sparse), self.experts(sparse)
        with router.register_forward_hook(score), experts.register_forward_pre_hook(see):
            yield

    def replaced(self, sparse: nn.Module, experts: Callables) -> AbstractContextManager[None]:
        def make(original: Any) -> Any:
            def forward(hidden: Tensor) -> Tensor:
                of_experts = hidden.view(self.num_experts(sparse), -1, hidden.shape[-1])  # (E, N, h)
                output: Tensor = original(hidden).clone().view(of_experts.shape)
                for index, expert in experts.items():
                    own = of_experts[index].any(dim=-1)  # the others' tokens are zero, scaled by a score of 0
                    output[index, own] = expert(of_experts[index, own]).to(output.dtype)
                return output.view(hidden.shape)

            return forward

        return put(self.experts(sparse), "forward", make)

    def deciding_again(self, sparse: nn.Module, closed: Callable[[], Tensor]) -> AbstractContextManager[None]:
        raise LamellaError("Llama 4 scales tokens before its experts read them, so its router cannot decide twice.")
