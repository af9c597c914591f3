"""MoLA as a method of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peft import get_peft_model
from pydantic import Field

from lamella.lab.methods.base import Built, Method, method, shared
from lamella.tuners.mola import MolaConfig

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("mola")
class Mola(Method):
    """Layer-wise mixtures of LoRA experts; the keys are those of `lamella.MolaConfig`."""

    name: Literal["mola"] = "mola"
    r: int = Field(8, gt=0)
    lora_alpha: float = 16
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | None = None
    num_experts: int | list[int] | str = "2-4-6-8"
    expert_budget: float | None = None
    top_k: int | list[int] = 2
    router: Literal["linear", "cosine"] = "linear"
    router_aux_loss_coef: float = Field(1e-3, ge=0.0)
    router_z_loss_coef: float = Field(0.0, ge=0.0)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture; which layer got how many experts is in the model's own summary."""
        config = MolaConfig(**self.model_dump(exclude={"name"}), **shared(backbone, task))
        return Built(get_peft_model(backbone.model, config))
