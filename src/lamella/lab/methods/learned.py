"""Weights that need not sum to 1, learned for every LoRA in every matrix: the same for all inputs, or gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import ComposingMethod, Loras, RebuiltMethod, Target
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
        return Built(_side_by_side(self.loras(backbone, task), Target(backbone, task), _Weighted))


@method("gates")
class Gates(RebuiltMethod):
    """In each matrix, for every token, one gate ``sigmoid(w . h + b)`` for every LoRA's delta; gates need not sum to 1.

    They read ``h = A x``, what the LoRAs make of the token in that matrix, and start at 1/2 each.
    """

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The LoRAs side by side as one, frozen but for the gates."""
        return Built(_side_by_side(self.loras(backbone, task), Target(backbone, task), _Gated))


def _side_by_side(loras: Loras, target: Target, weighting: type[_SideBySide]) -> nn.Module:
    together = weighted_sum(loras, dict.fromkeys(loras, 1.0))
    model = target.with_lora(together)
    for module in together:
        ranks = [len(modules[module].A) for modules in loras.values() if module in modules]
        layer: Any = target.backbone.model.get_submodule(module)
        layer.lora_B["default"] = weighting(layer.lora_B["default"].weight, ranks)
    return model


class _SideBySide(nn.Module):
    """The B of K LoRAs side by side, ``(out, R)``, given ``h = A x (*rows, R)``."""

    ranks: Tensor

    def __init__(self, weight: nn.Parameter, ranks: Sequence[int]) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("ranks", torch.tensor(ranks, device=weight.device), persistent=False)

    def weigh(self, h: Tensor) -> Tensor:
        """Each LoRA's weight, ``(K,)`` or ``(*rows, K)``."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        """``(*rows, out)``."""
        columns = self.weigh(h).repeat_interleave(self.ranks, dim=-1)  # (R,) or (*rows, R)
        return nn.functional.linear(h * columns.to(h.dtype), self.weight.to(h.dtype))


class _Weighted(_SideBySide):
    def __init__(self, weight: nn.Parameter, ranks: Sequence[int]) -> None:
        super().__init__(weight, ranks)
        self.weights = nn.Parameter(torch.full((len(ranks),), 1.0 / len(ranks), device=weight.device))

    def weigh(self, h: Tensor) -> Tensor:
        return self.weights

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        folded = self.weight * self.weights.repeat_interleave(self.ranks)  # (out, R)
        destination[f"{prefix}weight"] = folded if keep_vars else folded.detach()


class _Gated(_SideBySide):
    def __init__(self, weight: nn.Parameter, ranks: Sequence[int]) -> None:
        super().__init__(weight, ranks)
        self.gate = nn.Parameter(torch.zeros(len(ranks), sum(ranks), device=weight.device))  # w
        self.gate_bias = nn.Parameter(torch.zeros(1, len(ranks), device=weight.device))  # a row: of vectors PEFT warns

    def weigh(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h.to(self.gate.dtype) @ self.gate.T + self.gate_bias)
