"""PEFT's LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft import LoraConfig, get_peft_model
from pydantic import Field, SerializeAsAny, field_validator

from lamella.lab.methods.base import (
    Built,
    Method,
    method,
    method_from,
    on_meta,
    require_own_head,
    shared,
    trainable_parameters,
)

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("lora")
class Lora(Method):
    """PEFT's LoRA; with ``match`` its rank is the one whose trainable parameters come nearest to another method's."""

    trains_head: ClassVar[bool] = True

    name: Literal["lora"] = "lora"
    r: int = Field(8, gt=0)
    lora_alpha: float = 16
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | None = None
    match: SerializeAsAny[Method] | None = Field(None, description="a method; lora_alpha / r is kept, r is chosen")

    @field_validator("match", mode="before")
    @classmethod
    def _match(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, Method) else method_from(value)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The adapted model; with ``match``, the rank and both parameter counts are in ``decided``.

        Raises:
            LamellaError: the head does not learn, and the backbone has none of its own.
        """
        if not self.trains_head:
            require_own_head(backbone, task, self.name)
        if self.match is None:
            return Built(get_peft_model(backbone.model, self._config(backbone, task, self.r)))
        target = trainable_parameters(self.match.build(on_meta(backbone), task).model)
        rank = self._rank_for(target, backbone, task)
        model = get_peft_model(backbone.model, self._config(backbone, task, rank))
        decided = {"rank": rank, "matched_parameters": target, "matched_method": self.match.name}
        return Built(model, decided)

    def _rank_for(self, target: int, backbone: Backbone, task: Task) -> int:
        # LoRA's parameters are an affine function of its rank: two counts give them all
        one, two = (
            trainable_parameters(get_peft_model((meta := on_meta(backbone)).model, self._config(meta, task, rank)))
            for rank in (1, 2)
        )
        return max(1, round(1 + (target - one) / (two - one)))

    def _config(self, backbone: Backbone, task: Task, rank: int) -> LoraConfig:
        values = self.model_dump(exclude={"name", "match"}) | {"r": rank, "lora_alpha": self.lora_alpha * rank / self.r}
        return LoraConfig(**values, **shared(backbone, task, train_head=self.trains_head))


@method("lora-only")
class LoraOnly(Lora):
    """PEFT's LoRA and nothing else: the task head is the backbone's own and stays, as LoRAs to be composed need it."""

    trains_head: ClassVar[bool] = False

    name: Literal["lora-only"] = "lora-only"  # type: ignore[assignment]
