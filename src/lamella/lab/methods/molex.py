"""MoLEx as a method of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peft import LoraConfig, get_peft_model
from pydantic import Field

from lamella.lab.methods.base import Built, Method, method, shared
from lamella.lab.methods.fixed_guest import find_fixed_layer
from lamella.tuners.molex import MolexConfig

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("molex")
class Molex(Method):
    """Mixtures of pretrained blocks with LoRA inside; the keys are those of `lamella.MolexConfig` and of its LoRA."""

    name: Literal["molex"] = "molex"
    r: int = Field(8, gt=0)
    lora_alpha: float = 16
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = Field(None, description="linear modules that the LoRA leaves alone")
    layers_to_transform: list[int] | None = Field(None, description="blocks that mix; the LoRA is in all of them")
    alpha: float = Field(0.95, ge=0.0, le=1.0)
    alpha_mode: Literal["fixed", "learned"] = "fixed"
    alpha_scope: Literal["shared", "per-layer"] = "shared"
    router: Literal["linear", "cosine"] = "linear"
    router_proj: int | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    router_scope: Literal["shared", "per-layer"] = "shared"
    top_k: int = Field(1, gt=0)
    granularity: Literal["sequence", "batch", "token"] = "sequence"
    aggregate: Literal["mean", "mode"] = "mean"
    candidates: Literal["all", "later"] | list[int] = "all"
    router_gradient: Literal["scale", "straight-through", "none"] = "scale"
    policy: Literal["learned", "random", "fixed", "self", "uniform"] = "learned"
    fixed_layer: int | None = None
    prompt_tokens: int = Field(4, gt=0)
    router_aux_loss_coef: float = Field(1e-3, ge=0.0)
    guest_dtype: Literal["float32", "bfloat16"] | None = None
    recompute_guest: bool = False
    seed: int = Field(0, description="of the policy 'random'")

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The mixture; which blocks each one can choose is in the model's own summary.

        Policy "fixed" without a layer finds the best one on training rows; it is in ``decided``.
        """
        inside = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"}
        lora = LoraConfig(**self.model_dump(include=inside))
        config = MolexConfig(lora=lora, **self.model_dump(exclude={"name", *inside}), **shared(backbone, task))
        decided = {}
        if self.policy == "fixed" and self.fixed_layer is None:
            on_meta = next(backbone.model.parameters()).is_meta  # only counted, and every layer counts the same
            config.fixed_layer = 0 if on_meta else find_fixed_layer(backbone, task, config)
            decided = {"fixed_layer": config.fixed_layer}
        return Built(get_peft_model(backbone.model, config), decided)
