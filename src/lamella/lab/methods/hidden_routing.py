"""Routing by the hidden state: what MOLE's routers, which read the LoRAs' outputs, are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from peft import get_peft_model
from pydantic import Field

from lamella.lab.methods.base import Built, method, shared
from lamella.lab.methods.compositions import Composition, Modules
from lamella.tuners.mola import MolaConfig, MolaLinear

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("hidden-routing")
class HiddenRouting(Composition):
    """In each adapted matrix a softmax over all LoRAs for every token, from the matrix's own input.

    It is MoLA with the trained LoRAs as frozen experts, all of them chosen, and routers that start even; the routers
    alone train. A LoRA with a lower rank, or without factors in a module, is filled up with zeros.
    """

    name: Literal["hidden-routing"] = "hidden-routing"
    router_aux_loss_coef: float = Field(1e-3, ge=0.0)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture; at its start it is the mean of the LoRAs' deltas."""
        loras = list(self.loras(backbone, task).values())
        rank = max(len(own.A) for modules in loras for own in modules.values())
        targets = list(dict.fromkeys(module for modules in loras for module in modules))
        config = MolaConfig(
            r=rank,
            lora_alpha=rank,
            num_experts=len(loras),
            top_k=len(loras),
            router_aux_loss_coef=self.router_aux_loss_coef,
            target_modules=targets,
            **shared(backbone, task, train_head=False),
        )
        model = get_peft_model(backbone.model, config)
        bare = model.get_base_model()
        for module in targets:
            layer = bare.get_submodule(module)
            assert isinstance(layer, MolaLinear)
            _freeze_experts(layer, module, loras)
        return Built(model)


def _freeze_experts(layer: MolaLinear, module: str, loras: list[Modules]) -> None:
    down, up = layer.lamella_mola_lora_A["default"], layer.lamella_mola_lora_B["default"]  # (E, r, in), (E, out, r)
    with torch.no_grad():
        down.zero_()
        up.zero_()
        for expert, modules in enumerate(loras):
            if (own := modules.get(module)) is not None:
                down[expert, : len(own.A)] = own.A
                up[expert, :, : len(own.A)] = own.scaling * own.B
        for parameter in layer.lamella_mola_router["default"].parameters():
            parameter.zero_()
    down.requires_grad_(False)
    up.requires_grad_(False)
