"""Weights that need not sum to 1, learned for every LoRA in every matrix, the same for all inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import ComposingMethod, Target
from lamella.lab.methods.sums import weighted_sum

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task


@method("learned-weights")
class LearnedWeights(ComposingMethod):
    """In each matrix one learned weight for every LoRA's delta, unbounded, the same for all inputs. They start
    at 1/K for the K LoRAs that adapt the matrix.

    What is saved is one LoRA, the weights inside its B, so that an interrupted run begins anew.

    Source: Prabhakar et al., LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks, COLING 2025, CAT.
    """

    resumes: ClassVar[bool] = False
    decays: ClassVar[bool] = False

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The LoRAs side by side as one, frozen but for the weights."""
        loras = self.loras(backbone, task)
        together = weighted_sum(loras, dict.fromkeys(loras, 1.0))
        model = Target(backbone, task).with_lora(together)
        for module in together:
            ranks = [len(modules[module].A) for modules in loras.values() if module in modules]
            layer: Any = backbone.model.get_submodule(module)
            layer.lora_B["default"] = _Weighted(layer.lora_B["default"].weight, ranks)
        return Built(model)


class _Weighted(nn.Module):
    """The B of K LoRAs side by side, ``(out, R)``, given ``h = A x (*rows, R)``, and a weight for each."""

    ranks: Tensor

    def __init__(self, weight: nn.Parameter, ranks: Sequence[int]) -> None:
        super().__init__()
        self.weight = weight
        self.weights = nn.Parameter(torch.full((len(ranks),), 1.0 / len(ranks), device=weight.device))
        self.register_buffer("ranks", torch.tensor(ranks, device=weight.device), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """``(*rows, out)``."""
        columns = self.weights.repeat_interleave(self.ranks)  # (R,)
        return nn.functional.linear(h * columns.to(h.dtype), self.weight.to(h.dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        folded = self.weight * self.weights.repeat_interleave(self.ranks)  # (out, R)
        destination[f"{prefix}weight"] = folded if keep_vars else folded.detach()
