"""Compositions that are searched for without a gradient, by scores on the task's training rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from lamella.errors import LamellaError, optional_module
from lamella.lab.methods.base import Built
from lamella.lab.methods.compositions import Loras, Target, composition, fill
from lamella.lab.methods.sums import factor_sum
from lamella.lab.scoring import score, selection
from lamella.progress import counted, working

_BATCH = 64

# of LoRAHub: the weight of its regulariser, the largest weight of a LoRA, and the standard deviation of the first ones
_REGULARISER, _BOUND, _START = 0.05, 1.5, 0.5

Count = Annotated[int, Field(gt=0)]
Scores = Callable[[nn.Module], dict[str, float]]


@composition("best")
def best(loras: Loras, target: Target, max_length: Count = 128) -> Built:
    """The LoRA that serves best on the task's training rows, by the task's metric. Nothing is trained.

    Which one it is and the scores of all are in ``decided``; rows are cut at ``max_length`` tokens.
    """
    score_of, by = scores_on_training_rows(target, max_length), selection(target.task)
    scores = {}
    for name, modules in counted(loras.items(), "scoring LoRAs", "LoRAs"):
        model = target.with_lora(modules)
        scores[name] = score_of(model)[by.name]
        model.unload()
    chosen = (max if by.greater_is_better else min)(scores, key=scores.__getitem__)
    return Built(target.with_lora(loras[chosen]), {"chosen": chosen, "training_scores": scores})


@composition("lorahub")
def lorahub(
    loras: Loras, target: Target, examples: Count = 64, evaluations: Count = 40, max_length: Count = 128
) -> Built:
    """Factors added with weights in [-1.5, 1.5] that minimise ``loss + 0.05 mean|w|`` on a few training rows.

    The search is CMA-ES from zero weights, so many ``evaluations`` of sets of weights, each on so many ``examples``. A
    and B take the same weight, as published, so that the term B_i A_i has its square. The best weights are in
    ``decided`` with their objective.

    Source: Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition, COLM 2024, §3.

    Raises:
        LamellaError: fewer than two LoRAs, factors that do not correspond, or cma is not installed.
    """
    cma = _cma()
    if len(loras) < 2:
        raise LamellaError("'lorahub' searches for the weights of at least two LoRAs. Use 'single' for one.")
    score_of = scores_on_training_rows(target, max_length, examples)
    model = target.with_lora(factor_sum(loras, *[dict.fromkeys(loras, 0.0)] * 2))

    def put(weights: Sequence[float]) -> None:
        given = dict(zip(loras, weights, strict=True))
        fill(target.backbone.model, "default", factor_sum(loras, given, given))

    with working("searching weights", evaluations, "evaluations") as work:

        def objective(weights: Sequence[float]) -> float:
            put(weights)
            loss = score_of(model)["loss"]
            work.advance()
            return loss + _REGULARISER * sum(map(abs, weights)) / len(weights)

        weights, lowest = _search(cma, objective, len(loras), evaluations)
    put(weights)
    return Built(model, {"weights": dict(zip(loras, weights, strict=True)), "objective": lowest})


def scores_on_training_rows(target: Target, max_length: int, rows: int | None = None) -> Scores:
    """A function that gives a model's metrics on the task's training rows.

    Args:
        target: whose task it is.
        max_length: tokens per row.
        rows: how many of them, the same ones always; all where None.
    """
    from lamella.lab.data import encode

    # multiple choice is read in another way to train on than to be scored, and that hangs on the split's name
    task = target.task.of_each(lambda part: {"validation": part.splits["train"]} if "train" in part.splits else {})
    encoded = encode(
        task,
        target.backbone.tokenizer,
        max_length=max_length,
        limit=None if rows is None else {"validation": rows},
        decoder=target.backbone.decoder,
    )
    read = encoded.validation
    assert read is not None
    return lambda model: score(model, task, read, encoded.collator, _BATCH).metrics


def _search(
    cma: Any, objective: Callable[[Sequence[float]], float], dimensions: int, evaluations: int
) -> tuple[list[float], float]:
    """The best of so many sets of weights, the first of them all zero, and its objective."""
    best = [0.0] * dimensions
    lowest, left = objective(best), evaluations - 1
    seed = int(torch.randint(1, 2**31 - 1, ()))  # of the run's generator; 0 would mean the clock
    search = cma.CMAEvolutionStrategy(best, _START, {"bounds": [-_BOUND, _BOUND], "seed": seed, "verbose": -9})
    while left > 0:
        asked = [list(map(float, weights)) for weights in search.ask()]
        values = [objective(weights) for weights in asked[:left]]
        left -= len(values)
        for weights, value in zip(asked, values, strict=False):
            if value < lowest:
                best, lowest = weights, value
        if len(values) == len(asked):  # a generation that the budget cut short is the last
            search.tell(asked, values)
    return best, lowest


def _cma() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot plot
        return optional_module("cma", "LoRAHub, which searches by CMA-ES,", extra="search")
