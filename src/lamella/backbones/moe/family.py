"""What lamella must know of a family of mixture-of-experts models, and the families it knows."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe.expert import Activation, Expert
from lamella.backbones.moe.interventions import replace_experts, restrict_router, restricted
from lamella.routing import Routing

FAMILIES: list["MoEFamily"] = []
Callables = Mapping[int, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class NativeRouting(Routing):
    """A native router's decision; its probabilities need not be a softmax over its logits.

    Attributes:
        weights: what each expert's output is multiplied by, ``(N, k)``: they need not sum to 1, and are 0 where an
            expert had no room.
        scores: what the router calls an expert's probability, normalised over the experts, ``(N, E)``; None where
            that is a softmax over the logits.
        kept: False where an expert was chosen but had no room for the token, ``(N, k)``; None where that cannot be.
    """

    scores: Tensor | None = None
    kept: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """The normalised scores, ``(N, E)``."""
        return super().probs if self.scores is None else self.scores


class MoEFamily:
    """The parts of one family's sparse module, for transformers' layout: fused experts behind a router called gate.

    A family is a subclass with an instance in ``FAMILIES``; it overrides what differs. Routings are read as the model
    made them, in training too (with its jitter and its sampling); ``Expert`` leaves out dropout.
    """

    sparse: ClassVar[tuple[str, ...]]  # class names of the module that holds router and experts
    native: ClassVar[bool] = True  # whether the model came with them, instead of an adapter
    router_name: ClassVar[str] = "gate"
    experts_name: ClassVar[str] = "experts"
    logits_at: ClassVar[int] = 0  # where the logits are in what the router puts out

    def of(self, sparse: nn.Module) -> "MoEFamily | None":
        """The family as it is for this module; None where the module routes nothing."""
        return self

    def router(self, sparse: nn.Module) -> nn.Module:
        """The module that scores the experts."""
        return sparse.get_submodule(self.router_name)

    def experts(self, sparse: nn.Module) -> nn.Module:
        """The module that holds the experts."""
        return sparse.get_submodule(self.experts_name)

    def num_experts(self, sparse: nn.Module) -> int:
        """E."""
        return int(self.experts(sparse).num_experts)  # type: ignore[arg-type]

    def top_k(self, sparse: nn.Module) -> int:
        """How many experts a token gets."""
        return int(self.router(sparse).top_k)  # type: ignore[arg-type]

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        """One expert, by views of the fused parameters."""
        experts: Any = self.experts(sparse)
        both = experts.gate_up_proj[index]  # (2*ff, h)
        ff = both.shape[0] // 2
        return Expert(both[ff:], experts.down_proj[index], Gated(experts.act_fn), both[:ff])

    def shared(self, sparse: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What every token gets beside its experts, ``(N, h) -> (N, h)``; None where there is nothing."""
        return None

    def read(self, router: nn.Module, output: Any) -> NativeRouting:
        """The decision in what the router put out, for the N tokens of all sequences."""
        logits, weights, indices = output
        logits = widen(logits)
        return NativeRouting(logits, weights.to(logits.dtype), indices)

    def route(self, sparse: nn.Module, x: Tensor) -> NativeRouting:
        """The router's decision for tokens ``x (N, h)`` or ``(batch, tokens, h)``."""
        router = self.router(sparse)
        return self.read(router, router(x.reshape(-1, x.shape[-1])))

    def decide(self, router: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the router puts out for these logits ``(N, E)``, with -inf for experts that may not be chosen."""
        raise NotImplementedError

    def chosen(self, selected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Indices ``(N, k)``, and which were kept, in what the experts' forward is given as its second argument."""
        return selected, None

    @contextmanager
    def watched(self, sparse: nn.Module, tell: Callable[[Tensor, NativeRouting], None]) -> Iterator[None]:
        """Inside the context, ``tell`` gets what the router is given, as it is, and what it decides."""

        def hook(router: nn.Module, args: Any, output: Any) -> None:
            with torch.no_grad():
                tell(args[0].detach(), self.read(router, output))

        handle = self.router(sparse).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def replaced(self, sparse: nn.Module, experts: Callables) -> AbstractContextManager[None]:
        """Inside the context, tokens of these experts go to these callables."""
        return replace_experts(self.experts(sparse), self.chosen, experts)

    def masked(self, sparse: nn.Module, experts: Collection[int]) -> AbstractContextManager[None]:
        """Inside the context, the router cannot choose these experts."""
        router = self.router(sparse)

        def again(original: Any, masked: frozenset[int], x: Tensor) -> Any:
            output = original(x)
            decided = self.decide(router, without(output[self.logits_at], masked))
            return tuple(new.to(old.dtype) for new, old in zip(decided, output, strict=True))

        return restrict_router(router, "forward", again, experts)

    def masks(self, sparse: nn.Module) -> frozenset[int]:
        """The experts that the router may not choose now."""
        return restricted(self.router(sparse), "forward")


def register(family: type[MoEFamily]) -> type[MoEFamily]:
    """Makes a family known; a class decorator."""
    FAMILIES.append(family())
    return family


@dataclass(frozen=True)
class Gated:
    """``activation(gate) * up``, the gated linear unit that most families use."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The hidden units ``(N, ff)``."""
        assert gate is not None
        return self.activation(gate) * up


def ungated(activation: Callable[[Tensor], Tensor]) -> Activation:
    """``activation(up)``."""
    return lambda _, up: activation(up)


def softmax_top_k(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Weights and indices ``(N, k)``: the k largest of a softmax over all experts, normalised or not."""
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, indices = probs.topk(top_k, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True) if normalise else weights), indices


def without(logits: Tensor, masked: Collection[int]) -> Tensor:
    """The logits ``(..., E)`` with -inf for the masked experts."""
    return logits.index_fill(-1, torch.tensor(sorted(masked), dtype=torch.long, device=logits.device), -torch.inf)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
