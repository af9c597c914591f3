"""Arithmetic on the LoRAs' factors: PEM composition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import Composition, as_lora, factor_sum

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("pem")
class Pem(Composition):
    """Addition and negation of LoRAs, factor by factor: A and B are each weighted and added. Nothing is trained.

    A negative weight is negation followed by addition: the sign goes to B alone, since that of both would cancel. The
    cross terms ``B_i A_j`` belong to the published method; with weights 1/K a LoRA's own term has the weight 1/K².

    Source: Zhang et al., Composing Parameter-Efficient Modules with Arithmetic Operations, NeurIPS 2023, §3.
    """

    name: Literal["pem"] = "pem"
    weights: dict[str, float] = Field(default_factory=dict, description="by name; 1/K each if absent")

    def build(self, backbone: Backbone, task: Task) -> Built:
        """One LoRA of their common rank; raises LamellaError where factors do not correspond."""
        loras = self.loras(backbone, task)
        weights = self.weights or dict.fromkeys(loras, 1.0 / len(loras))
        if weights.keys() != loras.keys():
            odd = sorted(weights.keys() ^ loras.keys())[0]
            raise LamellaError(f"weights and adapters must name the same LoRAs; {odd!r} is in one of them only.")
        down = {name: abs(weight) for name, weight in weights.items()}
        return Built(as_lora(backbone, task, factor_sum(loras, down, weights)))
