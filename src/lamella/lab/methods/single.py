"""One trained LoRA by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import Composition, as_lora
from lamella.lab.schema import unknown_key

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("single")
class Single(Composition):
    """One of the trained LoRAs, as it is. Nothing is trained."""

    name: Literal["single"] = "single"
    adapter: str

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The backbone with that LoRA; raises LamellaError where there is none of that name."""
        if self.adapter not in self.adapters:
            raise LamellaError(unknown_key(self.adapter, self.adapters, "adapters.").replace("setting", "LoRA", 1))
        return Built(as_lora(backbone, task, self.loras(backbone, task)[self.adapter]))
