"""MoLA's experts as LoRAs that lie side by side, for collapsing and exporting."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lamella.backbones.offloading import onloaded
from lamella.routing import Routing, find_tracker
from lamella.tuners.mola.config import MolaConfig
from lamella.tuners.mola.layer import MolaLinear
from lamella.tuners.routed import See


class MolaMixture:
    """The experts of one adapter; each module routes by itself."""

    def __init__(self, model: nn.Module, adapter: str, config: MolaConfig) -> None:
        self.adapter, self.config = adapter, config
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, MolaLinear) and adapter in module.experts
        }
        tracker = find_tracker(model)
        assert tracker is not None  # every injection sets one
        self.tracker = tracker

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(J*r, in)`` and ``(out, J*r)``, J experts with what is subtracted from them."""
        layer = self.layers[name]
        with onloaded(*layer.held(self.adapter)):
            A, B = (factor.double().cpu() for factor in layer.mixed(self.adapter))
        return A.flatten(0, 1), layer.experts[self.adapter].scaling * B.transpose(1, 2).flatten(0, 1).t()

    def experts(self) -> tuple[LoraConfig, list[dict[str, tuple[Tensor, Tensor]]]]:
        """Expert e of every module that has one, all of one rank: rows and columns of zeros fill up the others."""
        each: list[dict[str, tuple[Tensor, Tensor]]] = []
        for name, layer in self.layers.items():
            with onloaded(*layer.held(self.adapter)):
                A, B = layer.expert_factors(self.adapter)
            each += [{} for _ in range(len(A) - len(each))]
            for expert in range(len(A)):
                each[expert][name] = A[expert], B[expert]
        r, alpha = self.config.r, self.config.lora_alpha
        rank = max(len(A) for modules in each for A, _ in modules.values())
        if rank > r:
            each = [{name: _filled(A, B, rank) for name, (A, B) in modules.items()} for modules in each]
            alpha = self.config.scaling * rank
        elif self.config.use_rslora:  # readers that know none take alpha over the rank
            alpha *= r**0.5
        return LoraConfig(r=rank, lora_alpha=alpha), each

    @contextmanager
    def watched(self, see: See) -> Iterator[None]:
        """Inputs by a hook, weights as an observer."""
        names = {id(layer): name for name, layer in self.layers.items()}
        routings: dict[int, tuple[Routing, Tensor | None]] = {}

        def observe(layer: MolaLinear, adapter: str, routing: Routing, mask: Tensor | None, _: torch.Size) -> None:
            if adapter == self.adapter:
                routings[id(layer)] = (routing, mask)

        def add(layer: MolaLinear, args: tuple[Tensor, ...], _: Tensor) -> None:
            with onloaded(*layer.held(self.adapter)):
                A = layer.mixed(self.adapter)[0].flatten(0, 1)  # (J*r, in)
            h = args[0].reshape(-1, layer.in_features).to(A.dtype) @ A.t()  # (N, J*r)
            u = h
            if layer.routed(self.adapter):
                routing, mask = routings.pop(id(layer))
                weights = layer.weights(self.adapter, routing)
                assert weights is not None  # there is a router
                u = h * weights.to(h.dtype).repeat_interleave(layer.experts[self.adapter].r, dim=1)
                h, u = (h, u) if mask is None else (h[mask], u[mask])
            see(names[id(layer)], h, u)

        hooks = [layer.register_forward_hook(add) for layer in self.layers.values()]
        try:
            with self.tracker.observed(observe):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _filled(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A LoRA ``(r, in)`` and ``(out, r)`` of a larger rank."""
    more = rank - len(A)
    return nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more))
