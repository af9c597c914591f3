"""PEFT's merges of several LoRAs into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import Composition, as_loras

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("peft-merge")
class PeftMerge(Composition):
    """PEFT's `add_weighted_adapter`. Nothing is trained.

    ``linear``, ``ties``, ``dare_*`` and ``magnitude_prune`` work on A and B by themselves, so that cross terms appear;
    ``cat`` and ``svd`` on the deltas. DARE drops at random, by the run's seed.
    """

    name: Literal["peft-merge"] = "peft-merge"
    combination: Literal[
        "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
        "magnitude_prune", "magnitude_prune_svd",
    ]  # fmt: skip
    weight: float | None = Field(None, description="of every LoRA; 1/K if absent")
    density: float = Field(0.5, gt=0.0, le=1.0, description="share that ties, dare and magnitude_prune keep")
    svd_rank: int | None = Field(None, gt=0, description="of the svd forms; the largest rank of the LoRAs if absent")
    majority_sign_method: Literal["total", "frequency"] = "total"

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The merged LoRA; raises LamellaError where PEFT cannot merge these."""
        loras = self.loras(backbone, task)
        # PEFT refuses names with dots, and reserves none of these
        inside = {f"lora_{index}": modules for index, modules in enumerate(loras.values())}
        model = as_loras(backbone, task, inside)
        weight = 1.0 / len(loras) if self.weight is None else self.weight
        try:
            model.add_weighted_adapter(
                list(inside),
                [weight] * len(inside),
                "default",
                combination_type=self.combination,
                svd_rank=self.svd_rank,
                svd_full_matrices=False,
                density=self.density,
                majority_sign_method=self.majority_sign_method,
            )
        except (ValueError, RuntimeError) as error:
            raise LamellaError(f"PEFT cannot merge these LoRAs by {self.combination}: {error}") from error
        model.set_adapter("default")
        for name in inside:
            model.delete_adapter(name)
        for parameter in model.requires_grad_(False).parameters():
            parameter.data = (
                parameter.data.contiguous()
            )  # of an SVD they are not, and would multiply otherwise once saved
        return Built(model)
