"""What all methods over trained LoRAs share: reading them, adding them up, and putting the sum on a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn

from lamella.adapters import Factors, check_base, map_to, read_lora
from lamella.errors import LamellaError
from lamella.lab.methods.base import Method, require_own_head, shared

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

# a LoRA on a model: factors by module
Modules = dict[str, Factors]


class Composition(Method):
    """Settings of a method over trained LoRAs. The LoRAs stay as they are, and so does the backbone's task head."""

    # how one of the LoRAs is left out afterwards: its routers share its weight out, or the rest is put together anew
    masked_by: ClassVar[Literal["routers", "rebuilding"] | None] = None

    adapters: dict[str, str] = Field(
        min_length=1, description="by any name: a PEFT folder, a run, a LoRA file or a hub id"
    )

    def loras(self, backbone: Backbone, task: Task) -> dict[str, Modules]:
        """The LoRAs by name, on this backbone.

        Raises:
            LamellaError: one cannot be read or belongs to another base, or the backbone's head is a new one.
        """
        require_own_head(backbone, task, self.name)
        return read_loras(backbone, self.adapters)


def read_loras(backbone: Backbone, adapters: Mapping[str, str]) -> dict[str, Modules]:
    """LoRAs by name, each with the backbone's own module names.

    Raises:
        LamellaError: one cannot be read, or does not fit the backbone.
    """
    found: dict[str, Modules] = {}
    for name, place in adapters.items():
        source = read_lora(lora_folder(place), name=name)
        check_base(backbone.model, source)
        found[name] = map_to(backbone.model, source).modules
    return found


def lora_folder(place: str) -> str:
    """Where the LoRA of a run lies; any other place is the LoRA's own."""
    run = Path(place)
    return str(run / "adapter") if (run / "run.yaml").is_file() else place


def weighted_sum(loras: Mapping[str, Modules], weights: Mapping[str, float]) -> Modules:
    """The LoRA whose delta is ``sum_i w_i s_i B_i A_i`` exactly: factors side by side, so that ranks add up.

    Args:
        loras: any ranks, scalings and modules; a LoRA adds nothing where it has no factors.
        weights: w by name; a LoRA without one is left out.
    """
    total: Modules = {}
    for module in dict.fromkeys(module for name in weights for module in loras[name]):
        parts = [(loras[name][module], weight) for name, weight in weights.items() if module in loras[name]]
        total[module] = Factors(
            A=torch.cat([own.A.float() for own, _ in parts]),
            B=torch.cat([weight * own.scaling * own.B.float() for own, weight in parts], dim=1),
            scaling=1.0,
        )
    return total


def factor_sum(loras: Mapping[str, Modules], down: Mapping[str, float], up: Mapping[str, float]) -> Modules:
    """The LoRA ``s (sum_i up_i B_i)(sum_i down_i A_i)``: factors added one by one, cross terms and all.

    Raises:
        LamellaError: modules, ranks or scalings differ, so that factors do not correspond.
    """
    names = list(down)
    first = loras[names[0]]
    for name in names[1:]:
        for module in first.keys() | loras[name].keys():
            _check_alike(module, (names[0], first.get(module)), (name, loras[name].get(module)))
    return {
        module: Factors(
            A=sum_of([down[name] * loras[name][module].A.float() for name in names]),
            B=sum_of([up[name] * loras[name][module].B.float() for name in names]),
            scaling=own.scaling,
        )
        for module, own in first.items()
    }


def sum_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape, added."""
    return torch.stack(tensors).sum(0)


def _check_alike(module: str, one: tuple[str, Factors | None], other: tuple[str, Factors | None]) -> None:
    said = [
        f"{name}: " + ("none" if own is None else f"rank {len(own.A)}, scaling {own.scaling:g}")
        for name, own in (one, other)
    ]
    if said[0].partition(": ")[2] != said[1].partition(": ")[2]:
        raise LamellaError(
            f"Adding the factors of LoRAs needs the same modules, ranks and scalings, but in {module} there is "
            f"{said[0]}; {said[1]}. Use 'uniform' or 'sum', which add the deltas themselves."
        )


def as_lora(backbone: Backbone, task: Task, modules: Modules) -> PeftModel:
    """The backbone with one frozen LoRA of these factors; its head is the backbone's own."""
    return as_loras(backbone, task, {"default": modules})


def as_loras(backbone: Backbone, task: Task, loras: Mapping[str, Modules]) -> PeftModel:
    """The backbone with frozen LoRAs as PEFT's adapters, the first of them active; its head is the backbone's own.

    Args:
        loras: by names that PEFT can use, without dots.
    """
    first, *others = loras
    config = lora_config(loras[first], **shared(backbone, task, train_head=False))
    model: PeftModel = get_peft_model(backbone.model, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, lora_config(loras[name]))
    for name, modules in loras.items():
        fill(backbone.model, name, modules)
    return model


def lora_config(modules: Modules, **values: Any) -> LoraConfig:
    """PEFT's config of a LoRA with these factors, to be used as it is."""
    ranks = {name: len(own.A) for name, own in modules.items()}
    alphas = {name: own.scaling * ranks[name] for name, own in modules.items()}
    first = next(iter(modules))
    return LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        rank_pattern={name: rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        target_modules=list(modules),
        inference_mode=True,
        **values,
    )


def fill(bare: nn.Module, adapter: str, modules: Modules) -> None:
    """Puts factors into an adapter of the same modules and ranks; ``bare`` is the model without PEFT's wrapping."""
    with torch.no_grad():
        for name, own in modules.items():
            layer: Any = bare.get_submodule(name)
            for weight, value in ((layer.lora_A[adapter].weight, own.A), (layer.lora_B[adapter].weight, own.B)):
                weight.copy_(value.view_as(weight))
