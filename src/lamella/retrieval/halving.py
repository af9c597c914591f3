"""Successive halving: all candidates see a few examples, the better half of them twice as many, and so on."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST = 4  # examples that every candidate sees


class Rung(NamedTuple):
    """One step: so many candidates are known on so many examples."""

    candidates: int
    examples: int


def plan_rungs(candidates: int, examples: int, keep: int) -> list[Rung]:
    """The steps until all examples are used: candidates halve while examples double, never below what is kept.

    Source: Jamieson & Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016,
    as LoRAuter (arXiv 2601.21795) uses it for LoRAs.

    Args:
        candidates: how many there are.
        examples: how many there are.
        keep: how many are wanted.
    """
    rungs = [Rung(candidates, min(_FIRST, examples))]
    while rungs[-1].examples < examples:
        left = max(min(keep, candidates), -(-rungs[-1].candidates // 2))
        rungs.append(Rung(left, min(2 * rungs[-1].examples, examples)))
    return rungs


def passes(rungs: Sequence[Rung]) -> int:
    """Examples that run through the model in all: a candidate's former examples count no second time."""
    before = [0, *(rung.examples for rung in rungs)]
    return sum(rung.candidates * (rung.examples - seen) for rung, seen in zip(rungs, before, strict=False))


def halve(
    names: Sequence[str],
    rungs: Sequence[Rung],
    keep: int,
    losses: Callable[[str, Sequence[int]], Tensor],
) -> list[str]:
    """The candidates with the smallest mean loss, the best first.

    Args:
        names: of the candidates.
        rungs: the steps.
        keep: how many are wanted.
        losses: a candidate's on some examples, by their numbers, ``(examples,)``.
    """
    seen: dict[str, Tensor] = {name: torch.zeros(0, dtype=torch.float64) for name in names}
    left = list(names)
    for rung in rungs:
        left = _best(left, seen, rung.candidates)
        for name in left:
            more = range(len(seen[name]), rung.examples)
            seen[name] = torch.cat([seen[name], losses(name, more)])
    return _best(left, seen, keep)


def _best(names: Sequence[str], seen: dict[str, Tensor], count: int) -> list[str]:
    """By mean loss, in the former order where it ties or is not finite."""
    means = {name: float(seen[name].mean()) if len(seen[name]) else 0.0 for name in names}
    return sorted(names, key=lambda name: means[name] if means[name] == means[name] else float("inf"))[:count]
