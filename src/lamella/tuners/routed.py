"""What a layer with routers answers about itself, so that nothing outside a method's folder needs to know its class."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lamella.backbones import Place
from lamella.backbones.offloading import onloaded
from lamella.errors import LamellaError


def refuse_recording(name: str) -> None:
    """Raises where a forward is recorded once and for all, with the decision of the example that it is given.

    Args:
        name: what decides for whole sequences, by which other operations run.
    """
    if torch.compiler.is_exporting():
        raise LamellaError(
            f"{name} decides for each sequence which computation runs, and torch.export would keep the one of the "
            "example for every input. Run the model itself, or export MoLA, a composition with form='delta', or a "
            "plain LoRA (lamella.collapse)."
        )


@dataclass(frozen=True)
class AttachedLoss:
    """What a router pays besides the task loss.

    Attributes:
        name: what the loss is called where losses are collected; routers that pay one loss together share the name.
        settings: the coefficients that ask for it, as the adapter's config writes them.
        may_be_zero: whether it is zero where all experts count alike.
        is_flat: whether it is the same wherever the router sends its tokens, so that it gives no gradient.
    """

    name: str
    settings: str
    may_be_zero: bool = False
    is_flat: bool = False


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """One router of an adapter, with the experts that it chooses from.

    Attributes:
        module: the layer that runs the experts, or the first of those that share the decision.
        name: dotted name of what is decided for.
        place: where that lies; with the adapter's name it is the key of a trace.
        adapter: the adapter's name.
        router: decides; it may be held by another layer.
        num_experts: N, those that can be chosen here.
        top_k: how many of them are.
        factors: of LoRA experts that this adapter trains, ``A (N, r, in)`` and ``B (N, out, r)``, the first axis 1 of a
            factor that all share; empty where the experts exist without the adapter (pretrained blocks, LoRAs trained
            before).
        starts: what the factors began as and is subtracted from the experts, so that these do nothing at first; empty
            where B begins at zero.
        experts: what each of them is as a LoRA, in that form, where it is not the factors themselves.
        scaling: what ``B A`` is multiplied by.
        expert_names: the names of the N experts; empty where they have only numbers.
        chooses_blocks: whether the experts are pretrained blocks, which need not all be used.
        learns: whether the adapter's settings let any loss reach the router.
        loss: what the router pays besides the task loss; None where nothing.
    """

    module: nn.Module
    name: str
    place: Place
    adapter: str
    router: nn.Module
    num_experts: int
    top_k: int
    factors: tuple[nn.Parameter, ...] = ()
    starts: tuple[Tensor, ...] = ()
    experts: Callable[[], tuple[Tensor, ...]] | None = None
    scaling: float = 1.0
    expert_names: tuple[str, ...] = ()
    chooses_blocks: bool = False
    learns: bool = True
    loss: AttachedLoss | None = None

    @property
    def untrained(self) -> bool:
        """Whether the experts are as they began, with B zero or subtracted, and do nothing."""
        if not self.factors:
            return False
        with self._onloaded() as read:
            if read.starts:
                return all(map(torch.equal, read.factors, read.starts))
            return not bool(read.factors[-1].any())

    def numbers(self) -> tuple[Tensor, ...]:
        """The experts as LoRAs, ``A (N, r, in)`` and ``B (N, out, r)``, also where accelerate keeps them elsewhere."""
        with self._onloaded() as read:
            return tuple(factor.detach() for factor in (read.factors if read.experts is None else read.experts()))

    @contextmanager
    def _onloaded(self) -> "Iterator[RoutedLayer]":
        module: Any = self.module
        with onloaded(*module.modules()):
            read = module.routed_layer(self.adapter)
            assert read is not None
            yield read


class RoutedModule(Protocol):
    """A layer of a PEFT method that mixes experts by a router.

    In its forward it tells each observer of the current frame what it chose:
    ``observe(layer, adapter, routing, mask, shape)``, where ``layer.place`` says where it lies.
    """

    active_adapters: list[str]

    def routed_layer(self, adapter: str) -> RoutedLayer | None:
        """The router that this module holds or asks for an adapter; None where it has none, or another answers."""


def routed_modules(model: nn.Module) -> Iterator[RoutedModule]:
    """The layers of a model that answer the protocol.

    Their classes are asked: to ask each module of a large model by ``isinstance`` takes longer than a small forward.
    """
    module: Any
    for module in model.modules():
        if hasattr(type(module), "routed_layer"):
            yield module


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Every router of the active adapters, in the order of the modules."""
    asked = ((module, adapter) for module in routed_modules(model) for adapter in module.active_adapters)
    return [layer for module, adapter in asked if (layer := module.routed_layer(adapter)) is not None]


# A module's name, its rank space h = A x at real tokens (N, R), and u, the same times the weights.
See = Callable[[str, Tensor, Tensor], None]


class LoraMixture(Protocol):
    """The LoRAs of one adapter that lie side by side, mixed by weights that depend on the input."""

    layers: dict[str, Any]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """All LoRAs of a module as one wide LoRA, ``(R, in)`` and ``(out, R)`` with the scaling, in float64."""

    def watched(self, see: See) -> AbstractContextManager[None]:
        """Shows what each module's rank space holds in the forwards inside the context."""

    def experts(self) -> tuple[LoraConfig, Sequence[dict[str, tuple[Tensor, Tensor]]]]:
        """The settings that the experts share as plain LoRAs, and the factors of each by module name.

        Raises:
            LamellaError: the experts are not the adapter's own.
        """
