"""LoRAHub: weights found without a gradient."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built, method
from lamella.lab.methods.compositions import Composition, as_lora, factor_sum, fill
from lamella.lab.methods.few_rows import FewRows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lamella.lab.data import Backbone, Task

_REGULARISER = 0.05
_BOUND = 1.5
_START = 0.5  # standard deviation of the first weights


@method("lorahub")
class LoraHub(Composition):
    """Factors added with weights in [-1.5, 1.5] that minimise ``loss + 0.05 mean|w|`` on a few training rows.

    The search is CMA-ES from zero weights. A and B take the same weight, as published, so that a LoRA's own term has
    its square.

    Source: Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition, COLM 2024, §3.
    """

    name: Literal["lorahub"] = "lorahub"
    examples: int = Field(64, gt=0, description="training rows that a set of weights is tried on")
    evaluations: int = Field(40, gt=0, description="sets of weights tried")
    max_length: int = Field(128, gt=0, description="tokens per row while weights are tried")

    def build(self, backbone: Backbone, task: Task) -> Built:
        """The LoRA of the best weights, which are in ``decided`` with their objective.

        Raises:
            LamellaError: fewer than two LoRAs, factors that do not correspond, or cma is not installed.
        """
        cma = _cma()
        loras = self.loras(backbone, task)
        if len(loras) < 2:
            raise LamellaError("'lorahub' searches for the weights of at least two LoRAs. Use 'single' for one.")
        rows = FewRows(backbone, task, self.max_length, self.examples)
        model = as_lora(backbone, task, factor_sum(loras, *[dict.fromkeys(loras, 0.0)] * 2))

        def put(weights: Sequence[float]) -> None:
            given = dict(zip(loras, weights, strict=True))
            fill(backbone.model, "default", factor_sum(loras, given, given))

        def objective(weights: Sequence[float]) -> float:
            put(weights)
            return rows.scores(model)["loss"] + penalty(weights)

        weights, lowest = _search(cma, objective, len(loras), self.evaluations)
        put(weights)
        return Built(model, {"weights": dict(zip(loras, weights, strict=True)), "objective": lowest})


def _search(
    cma: Any, objective: Callable[[Sequence[float]], float], dimensions: int, evaluations: int
) -> tuple[list[float], float]:
    """The best of so many sets of weights, the first of them all zero, and its objective."""
    best = [0.0] * dimensions
    lowest, left = objective(best), evaluations - 1
    seed = int(torch.randint(1, 2**31 - 1, ()))  # of the run's own generator; 0 would mean the clock
    search = cma.CMAEvolutionStrategy(best, _START, {"bounds": [-_BOUND, _BOUND], "seed": seed, "verbose": -9})
    while left > 0:
        asked = [list(map(float, weights)) for weights in search.ask()]
        found = [objective(weights) for weights in asked[:left]]
        left -= len(found)
        for weights, value in zip(asked, found, strict=False):
            if value < lowest:
                best, lowest = weights, value
        if len(found) == len(asked):  # a generation that the budget cut short is the last
            search.tell(asked, found)
    return best, lowest


def penalty(weights: Sequence[float]) -> float:
    """LoRAHub's regulariser: 0.05 times the mean of the weights' absolute values."""
    return _REGULARISER * sum(map(abs, weights)) / len(weights)


def _cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot plot
            return importlib.import_module("cma")
    except ImportError as error:
        raise LamellaError('LoRAHub searches by CMA-ES and needs cma: run `pip install "lamella[search]"`.') from error
