"""PEFT's prompt tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peft import PromptTuningConfig, PromptTuningInit, get_peft_model
from pydantic import Field

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, Method, method, shared

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("prompt-tuning")
class PromptTuning(Method):
    """Trained virtual tokens before the input (PEFT)."""

    name: Literal["prompt-tuning"] = "prompt-tuning"
    num_virtual_tokens: int = Field(20, gt=0)

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError for tasks that PEFT's prompt tuning has no model class for."""
        values = shared(backbone, task)
        if values["task_type"] is None:
            raise LamellaError(
                f"Prompt tuning has no form for {task.kind} tasks such as '{task.name}'. Choose lora, mola, molex or "
                "full."
            )
        config = PromptTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens, prompt_tuning_init=PromptTuningInit.RANDOM, **values
        )
        return Built(get_peft_model(backbone.model, config))
