"""The backbone by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES

from lamella.lab.methods.base import Built, Method, method, require_own_head, shared

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("bare")
class Bare(Method):
    """Nothing is added and nothing trained: what the others start from, scored as they are."""

    name: Literal["bare"] = "bare"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """Raises LamellaError where the backbone has no head of its own for the task."""
        require_own_head(backbone, task, self.name)
        # PEFT's own name for an adapter without adapted modules: the saved folder is a PEFT folder all the same
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, **shared(backbone, task, train_head=False))
        model = get_peft_model(backbone.model, config)
        return Built(model.requires_grad_(False))
