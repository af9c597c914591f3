"""The best of the trained LoRAs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import Composition, as_lora
from lamella.lab.methods.few_rows import FewRows
from lamella.lab.runs.scoring import selection

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("best")
class Best(Composition):
    """The LoRA that serves best on the task's training rows, by the task's own metric. Nothing is trained."""

    name: Literal["best"] = "best"
    max_length: int = Field(128, gt=0, description="tokens per row while they are compared")

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone with it; which one it is and the scores of all are in ``decided``."""
        loras = self.loras(backbone, task)
        rows, by = FewRows(backbone, task, self.max_length), selection(task)
        scores = {}
        for name, modules in loras.items():
            model = as_lora(backbone, task, modules)
            scores[name] = rows.scores(model)[by.name]
            model.unload()
        chosen = (max if by.greater_is_better else min)(scores, key=scores.__getitem__)
        return Built(as_lora(backbone, task, loras[chosen]), {"chosen": chosen, "training_scores": scores})
