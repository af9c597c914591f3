"""A model's mixture of LoRAs as collapsing and exporting see it: wide factors, and what the data makes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from lamella.errors import LamellaError
from lamella.kernels.frozen import group_rows, weigh
from lamella.routing import Frame, Routing
from lamella.routing.context import find_tracker
from lamella.tuners.mola.layer import MolaLinear
from lamella.tuners.mole.layer import MoleLinear
from lamella.tuners.mole.unit import Unit
from lamella.tuners.molex.block import MolexBlock

# A module's name, its rank space h = A x at real tokens (N, R), and u, the same times the weights.
See = Callable[[str, Tensor, Tensor], None]


class Mixture(Protocol):
    """The LoRAs of one adapter, mixed by weights that the data decides."""

    adapter: str
    layers: dict[str, Any]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """All LoRAs of a module as one wide LoRA, ``(R, in)`` and ``(out, R)`` with the scaling, in float64."""

    @contextmanager
    def watched(self, see: See) -> Iterator[None]:
        """Shows what each module's rank space holds in the forwards inside the context."""


def find_mixture(model: PeftModel) -> Mixture:
    """The mixture of a model's active adapter.

    Raises:
        LamellaError: there is none, or it is none of LoRAs that lie side by side.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: module for name, module in base.named_modules() if isinstance(module, MolaLinear | MoleLinear)}
    if any(isinstance(module, MolexBlock) for module in base.modules()):
        raise LamellaError(
            "MoLEx lets each sequence choose the blocks it runs through, so neither one plain LoRA nor one per expert "
            "does the same: lamella.collapse and lamella.export_experts are for MoLA and MOLE. Serve it with PEFT "
            "as it is, or train with policy='self', which is plain LoRA."
        )
    if not layers or not isinstance(model, PeftModel):
        raise LamellaError(
            f"{type(model).__name__} is no PeftModel with a MoLA adapter or a MOLE adapter; there are no experts to "
            "export."
        )
    adapter = model.active_adapters[0] if len(model.active_adapters) == 1 else None
    if adapter is None:
        raise LamellaError(
            f"{len(model.active_adapters)} adapters are active ({', '.join(model.active_adapters)}); activate one with "
            "set_adapter first."
        )
    composed = {name: one for name, one in layers.items() if isinstance(one, MoleLinear) and adapter in one.units}
    if composed:
        return MoleMixture(adapter, composed)
    routed = {name: one for name, one in layers.items() if isinstance(one, MolaLinear) and adapter in one.experts}
    return MolaMixture(model, adapter, routed)


class MolaMixture:
    """MoLA's: each module routes by itself."""

    def __init__(self, model: PeftModel, adapter: str, layers: dict[str, MolaLinear]) -> None:
        self.adapter, self.layers = adapter, layers
        tracker = find_tracker(model)
        assert tracker is not None  # every injection sets one
        self.tracker = tracker

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(E*r, in)`` and ``(out, E*r)``."""
        layer = self.layers[name]
        A = layer.lamella_mola_lora_A[self.adapter].double().cpu().flatten(0, 1)
        B = layer.lamella_mola_lora_B[self.adapter].double().cpu().transpose(1, 2).flatten(0, 1).t()
        return A, layer.experts[self.adapter].scaling * B

    @contextmanager
    def watched(self, see: See) -> Iterator[None]:
        """Inputs by a hook, weights as an observer."""
        names = {id(layer): name for name, layer in self.layers.items()}
        routings: dict[int, tuple[Routing, Tensor | None]] = {}

        def observe(layer: MolaLinear, adapter: str, routing: Routing, mask: Tensor | None, _: torch.Size) -> None:
            if adapter == self.adapter:
                routings[id(layer)] = (routing, mask)

        def add(layer: MolaLinear, args: tuple[Tensor, ...], _: Tensor) -> None:
            A = layer.lamella_mola_lora_A[self.adapter].flatten(0, 1)  # (E*r, in)
            h = args[0].reshape(-1, layer.in_features).to(A.dtype) @ A.t()  # (N, E*r)
            u = h
            if layer.routed(self.adapter):
                routing, mask = routings.pop(id(layer))
                r = layer.experts[self.adapter].r
                u = h * routing.dense_weights().to(h.dtype).repeat_interleave(r, dim=1)
                h, u = (h, u) if mask is None else (h[mask], u[mask])
            see(names[id(layer)], h, u)

        hooks = [layer.register_forward_hook(add) for layer in self.layers.values()]
        self.tracker.observers.append(observe)
        try:
            yield
        finally:
            self.tracker.observers.remove(observe)
            for hook in hooks:
                hook.remove()


class MoleMixture:
    """MOLE's: LoRAs that were trained already, weighed by units.

    Raises:
        LamellaError: whole blocks are mixed.
    """

    def __init__(self, adapter: str, layers: dict[str, MoleLinear]) -> None:
        self.adapter, self.layers = adapter, layers
        self.names = {id(layer): name for name, layer in layers.items()}
        self.units: set[Unit] = {layer.units[adapter] for layer in layers.values()}
        form = next(iter(self.units)).config.form
        if form != "delta":
            raise LamellaError(
                f"form={form!r} mixes the outputs of whole blocks, each run with one LoRA, and no plain LoRA does the "
                "same. Collapse a composition with form='delta'."
            )

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(R, in)`` and ``(out, R)``."""
        loras = self.layers[name].loras(self.adapter)
        return loras.A.double().cpu(), loras.B.double().cpu()

    @contextmanager
    def watched(self, see: See) -> Iterator[None]:
        """Inputs and weights as the units give them out."""

        def watch(layer: MoleLinear, x: Tensor, weights: Tensor, frame: Frame | None) -> None:
            loras = layer.loras(self.adapter)
            h = x.to(loras.A.dtype) @ loras.A.t()  # (*rows, R)
            u = weigh(*group_rows(h, weights.to(h)), loras.ranks).flatten(0, 1)  # (N, R)
            h = h.flatten(0, -2)
            mask = None if frame is None else frame.token_mask(x, of_encoder=layer.reads_encoder)
            see(self.names[id(layer)], *((h, u) if mask is None else (h[mask], u[mask])))

        for unit in self.units:
            unit.watchers.append(watch)
        try:
            yield
        finally:
            for unit in self.units:
                unit.watchers.remove(watch)


def modules_to_save(model: PeftModel, adapter: str) -> dict[str, dict[str, Tensor]]:
    """Trained modules outside the method, by name."""
    return {
        name: module.modules_to_save[adapter].state_dict()
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }
