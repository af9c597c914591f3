"""A layer of a mixture-of-experts model: router, experts as callables, and ways to put others in their place."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lamella.backbones.blocks import Place
from lamella.backbones.moe.expert import Expert, HoldsExperts
from lamella.backbones.moe.family import Callables, MoEFamily, NativeRouting
from lamella.backbones.offloading import is_offloaded, onloaded
from lamella.errors import LamellaError


class Experts(Sequence[Expert]):
    """The experts of one layer, each made anew from the layer's present parameters when it is asked for.

    Where accelerate has offloaded these, an expert is a copy.

    Raises:
        LamellaError: an expert is asked for that computes with more than its parameters (an adapter's, scales of
            quantised ones).
    """

    def __init__(self, family: MoEFamily, sparse: nn.Module) -> None:
        self._family, self._sparse = family, sparse

    def __len__(self) -> int:
        return self._family.num_experts(self._sparse)

    @property
    def _modules(self) -> Iterator[nn.Module]:
        return self._family.experts(self._sparse).modules()

    @overload
    def __getitem__(self, index: int) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> list[Expert]: ...
    def __getitem__(self, index: int | slice) -> Expert | list[Expert]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")
        offloaded = [module for module in self._modules if is_offloaded(module)]
        with onloaded(*offloaded):
            expert = self._made(index % len(self))
            return expert.copied() if offloaded else expert

    @property
    def width(self) -> int:
        """Features of what an expert is given; offloaded weights are not read for it."""
        return self._made(0).up.shape[1]

    def _made(self, index: int) -> Expert:
        if self._family.native and any(isinstance(one, BaseTunerLayer) for one in self._modules):
            raise LamellaError(
                f"The experts of this {type(self._sparse).__name__} are wrapped by a PEFT adapter, so their parameters "
                "are not all they compute with. Merge the adapter first (merge_and_unload), or keep it off the experts."
            )
        held = self._family.experts(self._sparse)
        return held.expert(index) if isinstance(held, HoldsExperts) else self._family.expert(self._sparse, index)


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One layer of a model whose tokens are given to experts.

    Attributes:
        index: index of its block, counted through the stacks of the model, the encoder's first.
        name: dotted name of the sparse module.
        family: what lamella knows of its kind.
        module: the sparse module: router, experts and what is shared.
        block: the transformer block around it.
        place: its stack, the index of its block there, and its name inside the block; as in the model without PEFT.
    """

    index: int
    name: str
    family: MoEFamily
    module: nn.Module
    block: nn.Module
    place: Place

    @property
    def experts(self) -> Experts:
        """The experts: ``layer.experts[e](x)``, ``(N, h) -> (N, h)``."""
        return Experts(self.family, self.module)

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.family.num_experts(self.module)

    @property
    def top_k(self) -> int:
        """How many experts a token gets."""
        return self.family.top_k(self.module)

    @property
    def shared(self) -> Callable[[Tensor], Tensor] | None:
        """What every token gets where its experts give nothing, ``(N, h) -> (N, h)``; None where that is nothing.

        Few families scale or normalise the sum of both, or project what the experts are given; the parts of a module
        are listed in docs/what-runs-where.md.
        """
        return self.family.shared(self.module)

    @property
    def router_module(self) -> nn.Module:
        """The module that scores the experts."""
        return self.family.router(self.module)

    @property
    def experts_module(self) -> nn.Module:
        """The module that holds the experts."""
        return self.family.experts(self.module)

    def router(self, x: Tensor) -> NativeRouting:
        """The router's decision for tokens ``x (N, h)``, or ``(batch, tokens, h)`` where experts have a capacity."""
        return self.family.route(self.module, x)

    @contextmanager
    def replace(self, experts: Callables) -> Iterator[None]:
        """Inside the context, tokens of these experts go to these callables, ``(N, h) -> (N, h)``, instead.

        The router's choices and weights stay. Where contexts are nested, the inner one's callables count. Leaving
        restores the layer bit for bit.

        Raises:
            LamellaError: an expert that the layer does not have.
        """
        self._check(experts)
        with self.family.replaced(self.module, experts):
            yield

    @contextmanager
    def mask(self, experts: Collection[int]) -> Iterator[None]:
        """Inside the context the router cannot choose these experts: its next choices take their place.

        Where contexts are nested, all that are masked count. Leaving restores the layer bit for bit.

        Raises:
            LamellaError: an expert that the layer does not have, or fewer experts left than a token gets.
        """
        self._check(experts)
        masked = self.family.masks(self.module) | set(experts)
        if self.num_experts - len(masked) < self.top_k:
            raise LamellaError(
                f"Masking {len(masked)} of the {self.num_experts} experts of layer {self.index} leaves fewer than "
                f"the {self.top_k} that each token gets; mask fewer."
            )
        with self.family.masked(self.module, experts):
            yield

    def _check(self, experts: Collection[int]) -> None:
        if unknown := [index for index in experts if not 0 <= index < self.num_experts]:
            raise LamellaError(
                f"Layer {self.index} ({self.name}) has the experts 0 to {self.num_experts - 1}, not {unknown[0]}."
            )
