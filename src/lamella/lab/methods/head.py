"""The task head alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, Method, head_names, method, shared

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("head")
class Head(Method):
    """Only the task head is trained."""

    name: Literal["head"] = "head"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError for a language model, which has no task head."""
        if not head_names(backbone.model):
            raise LamellaError(
                f"The method 'head' trains the task head alone, and '{backbone.name}' has none for the task "
                f"'{task.name}' ({task.kind}). Choose lora, mola, molex, prompt-tuning or full."
            )
        # PEFT's own name for an adapter without adapted modules: the saved folder is a PEFT folder all the same
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, **shared(backbone, task))
        return Built(get_peft_model(backbone.model, config))
