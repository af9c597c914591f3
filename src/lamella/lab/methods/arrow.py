"""PEFT's Arrow: routing by the LoRAs' own directions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peft import LoraConfig
from peft.tuners.lora.config import ArrowConfig
from pydantic import Field
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import Composition, as_loras

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

_ROUTER = "arrow_router"  # the one name that PEFT's Arrow does not take for a LoRA


@method("arrow")
class Arrow(Composition):
    """Each token goes to the LoRAs whose strongest input direction it lies along. Nothing is trained.

    Source: Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, ICML 2024, §3.
    """

    name: Literal["arrow"] = "arrow"
    top_k: int = Field(3, gt=0)
    temperature: float = Field(1.0, gt=0.0)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The routed LoRAs; raises LamellaError where ranks or modules differ, or top_k is more than there are."""
        loras = self.loras(backbone, task)
        if self.top_k > len(loras):
            raise LamellaError(f"top_k={self.top_k} is more than the {len(loras)} LoRAs given. Lower it.")
        # PEFT knows the LoRAs of an Arrow by these names
        inside = {f"task_{index}": modules for index, modules in enumerate(loras.values())}
        ranks = {(name, len(own.A)) for modules in inside.values() for name, own in modules.items()}
        if any(len(ranks) != len(modules) for modules in inside.values()) or len({rank for _, rank in ranks}) > 1:
            raise LamellaError("PEFT's Arrow needs LoRAs of one rank in the same modules. Leave out those that differ.")
        model = as_loras(backbone, task, inside)
        config = ArrowConfig(top_k=self.top_k, router_temperature=self.temperature, rng_seed=0)
        config.task_adapter_names, config.gks_adapter_names = list(inside), []
        rank = next(rank for _, rank in ranks)
        targets = sorted(name for name, _ in ranks)
        model.add_adapter(_ROUTER, LoraConfig(arrow_config=config, target_modules=targets, r=rank))
        model.set_adapter(_ROUTER)
        return Built(model.requires_grad_(False))

    def load(self, backbone: Backbone, task: Task, folder: Path) -> nn.Module:
        """Built anew: PEFT cannot load an Arrow from a folder, and nothing in it was trained."""
        return self.build(backbone, task).model
