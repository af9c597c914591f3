"""MoLA's routed modules as layers of experts, so that ``moe_layers`` finds them beside a model's own."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lamella.backbones.moe import Expert, MoEFamily, NativeRouting, register
from lamella.backbones.moe.expert import CopiedExpert
from lamella.backbones.moe.family import Callables, without
from lamella.backbones.moe.interventions import add_experts, put, restrict_router, restricted
from lamella.backbones.offloading import onloaded
from lamella.errors import LamellaError
from lamella.routing import Frame, Routing
from lamella.tuners.mola.layer import MolaLinear


@register
class MolaExperts(MoEFamily):
    """The experts of one adapter in one linear module: ``x (N, in) -> scaling * B_e A_e x (N, out)``."""

    sparse: ClassVar = ("MolaLinear",)
    native: ClassVar = False

    def __init__(self, adapter: str = "") -> None:
        self.adapter = adapter

    def of(self, sparse: nn.Module) -> "MolaExperts | None":
        """The active adapter's; None where it has no router here.

        Raises:
            LamellaError: several active adapters route here.
        """
        layer = cast(MolaLinear, sparse)
        routed = [] if layer.disable_adapters else [name for name in layer.active_adapters if layer.routed(name)]
        if len(routed) > 1:
            raise LamellaError(
                f"The adapters {', '.join(routed)} are active and route in {layer.name}, so its experts are not one "
                "set; activate one with set_adapter first."
            )
        return MolaExperts(routed[0]) if routed else None

    def router(self, sparse: nn.Module) -> nn.Module:
        return cast(MolaLinear, sparse).lamella_mola_router[self.adapter]

    def experts(self, sparse: nn.Module) -> nn.Module:
        return sparse

    def num_experts(self, sparse: nn.Module) -> int:
        return cast(MolaLinear, sparse).experts[self.adapter].num_experts

    def top_k(self, sparse: nn.Module) -> int:
        return cast(MolaLinear, sparse).experts[self.adapter].top_k

    def expert(self, sparse: nn.Module, index: int) -> Expert:
        """``up`` is ``A_e (r, in)``, ``down`` is ``B_e (out, r)``; in copies where an expert is more than both."""
        layer = cast(MolaLinear, sparse)
        scaling = layer.experts[self.adapter].scaling
        with onloaded(*layer.held(self.adapter)):
            A, B = layer.expert_factors(self.adapter)
            up, down = A[index], B[index]
        if reason := layer.not_its_own(self.adapter):
            why = f"The experts of {layer.name} {reason}, so that none of them can be written to alone."
            return CopiedExpert(up, down, lambda _, h: scaling * h, why=why)
        return Expert(up, down, lambda _, h: scaling * h)

    def route(self, sparse: nn.Module, x: Tensor) -> NativeRouting:
        return _as_native(self.router(sparse)(x.reshape(-1, x.shape[-1]), self.top_k(sparse)))

    def shared(self, sparse: nn.Module) -> Callable[[Tensor], Tensor]:
        """What the module did before."""
        return cast(MolaLinear, sparse).base_layer

    @contextmanager
    def watched(self, sparse: nn.Module, tell: Callable[[Tensor, NativeRouting], None]) -> Iterator[None]:
        def see(x: Tensor, routing: Routing) -> None:
            with torch.no_grad():
                tell(x.detach(), _as_native(routing))

        with self.routed(sparse, see):
            yield

    @contextmanager
    def routed(self, sparse: nn.Module, see: Callable[[Tensor, Routing], None]) -> Iterator[None]:
        """Inside the context, ``see`` gets the module's input and the routing that its experts are mixed by."""

        def make(route: Any) -> Any:
            def seen(adapter: str, x: Tensor, product: Tensor | None, frame: Frame | None) -> Routing | None:
                routing: Routing | None = route(adapter, x, product, frame)
                if adapter == self.adapter and routing is not None:
                    see(x, routing)
                return routing

            return seen

        with put(sparse, "_route", make):
            yield

    def replaced(self, sparse: nn.Module, experts: Callables) -> AbstractContextManager[None]:
        return put(sparse, "forward", lambda original: _StandIns(self, sparse, original, experts))

    def masked(self, sparse: nn.Module, experts: Collection[int]) -> AbstractContextManager[None]:
        def again(route: Any, masked: frozenset[int], logits: Tensor, top_k: int) -> Routing:
            decided: Routing = route(without(logits, masked), top_k)
            return decided

        return restrict_router(self.router(sparse), "route", again, experts)

    def masks(self, sparse: nn.Module) -> frozenset[int]:
        return restricted(self.router(sparse))


class _StandIns:
    """A module's forward with other callables in the place of experts: their difference is added to what it puts out.

    The module mixes all its experts in one product, so none can be left out of it.
    """

    def __init__(self, family: MolaExperts, sparse: nn.Module, original: Any, experts: Callables) -> None:
        self.family, self.sparse, self.original = family, sparse, original
        # What stands there already, by an outer context.
        self.standing: dict[int, Callable[[Tensor], Tensor]] = (
            {**original.standing, **original.experts} if isinstance(original, _StandIns) else {}
        )
        self.experts: Callables = experts

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        routings: list[Routing] = []
        with self.family.routed(self.sparse, lambda _, routing: routings.append(routing)):
            y: Tensor = self.original(x, *args, **kwargs)
        layer = cast(MolaLinear, self.sparse)
        flat = x.reshape(-1, x.shape[-1]).to(layer.factors(self.family.adapter)[0].dtype)  # (N, in)
        output = y.reshape(-1, y.shape[-1]).clone()  # (N, out)
        for routing in routings:  # none where the adapter has been disabled
            places = {index: routing.indices == index for index in self.experts}
            differences = {index: self._difference(index) for index in self.experts}
            add_experts(output, flat, routing.weights, places, differences)
        return output.view(y.shape)

    def _difference(self, index: int) -> Callable[[Tensor], Tensor]:
        new = self.experts[index]
        old = self.standing.get(index) or self.family.expert(self.sparse, index)
        return lambda x: new(x) - old(x)


def _as_native(routing: Routing) -> NativeRouting:
    return NativeRouting(routing.logits, routing.weights.to(routing.logits.dtype), routing.indices)
