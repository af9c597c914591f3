"""Fixed sums of trained LoRAs' deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import Composition, as_lora, weighted_sum

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("uniform")
class Uniform(Composition):
    """The mean of the LoRAs' deltas: normalised linear arithmetic (MOLE, eq. 2). Nothing is trained."""

    masked_by: ClassVar[Literal["rebuilding"]] = "rebuilding"

    name: Literal["uniform"] = "uniform"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """One LoRA of all their ranks together."""
        loras = self.loras(backbone, task)
        return Built(as_lora(backbone, task, weighted_sum(loras, dict.fromkeys(loras, 1.0 / len(loras)))))


@method("sum")
class Sum(Composition):
    """The sum of the LoRAs' deltas (MOLE, eq. 1). Nothing is trained."""

    name: Literal["sum"] = "sum"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """One LoRA of all their ranks together."""
        loras = self.loras(backbone, task)
        return Built(as_lora(backbone, task, weighted_sum(loras, dict.fromkeys(loras, 1.0))))
