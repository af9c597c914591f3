"""What a criterion says of a layer's experts, and the criteria by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.similarity.compression.calibration import LayerSample, fewest_experts

Action = Literal["drop", "replace", "merge"]


@dataclass(frozen=True)
class Ranking:
    """In which order the experts of a layer go, what that costs, and who does their work then.

    Attributes:
        order: the experts that can go, the first to go first.
        costs: what each adds to the damage when it goes after those before it.
        groups: from the number of experts that are gone to the groups of experts that come together, each with the one
            first that stands for the others; None where those that are gone have no successor.
        weights: how much each expert counts in a merged one, ``(E,)``.
        matched: whether hidden units are matched before they are averaged.
        constants: what a token gets from an expert that is gone, ``(E, h)``; None where it is nothing.
        aligners: A ``(h, h)`` and b ``(h,)`` by who is gone and who stands for it; x becomes ``A x + b`` before that.
    """

    order: Sequence[int]
    costs: Sequence[float]
    groups: Callable[[int], list[list[int]]] | None = None
    weights: Tensor | None = None
    matched: bool = True
    constants: Tensor | None = None
    aligners: Mapping[tuple[int, int], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Criterion:
    """One way to say which experts of a layer go first.

    Attributes:
        name: as it is asked for.
        action: "drop", the router can choose them no more; "replace", their tokens go to another expert or get a
            constant; "merge", experts become their average. The last two leave the router as it is.
        power: of the layer's gradient norm by which its costs are multiplied before layers are compared: 2 for squared
            errors, 1 for norms, 0 for what has no unit.
        cuts_router: whether a merged expert is chosen by its first member's row of the router alone.
        rank: the criterion, from a layer's sample and a seed.
    """

    name: str
    action: Action
    power: int
    cuts_router: bool
    rank: Callable[[LayerSample, int], Ranking]

    @property
    def source(self) -> str:
        """What it computes and where it was published."""
        return (self.rank.__doc__ or "").strip()


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, action: Action, power: int, cuts_router: bool = False
) -> Callable[[Callable[[LayerSample, int], Ranking]], Callable[[LayerSample, int], Ranking]]:
    """Makes a function a criterion; a decorator. See ``Criterion``."""
    assert action in get_args(Action)

    def register(rank: Callable[[LayerSample, int], Ranking]) -> Callable[[LayerSample, int], Ranking]:
        CRITERIA[name] = Criterion(name, action, power, cuts_router or action == "drop", rank)
        return rank

    return register


def find_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        LamellaError: there is none.
    """
    if name not in CRITERIA:
        raise LamellaError(f"criterion={name!r} is not one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def lowest_first(scores: Tensor) -> list[int]:
    """Indices of scores ``(E,)``, ascending; of equal ones the first comes first."""
    return torch.argsort(scores, stable=True).tolist()


def dropped_by(sample: LayerSample, scores: Tensor) -> Ranking:
    """The expert with the lowest of ``scores (E,)`` is dropped first, and each costs its score.

    Where the router chooses groups of experts first, all groups lose one expert before any loses the next.
    """
    turn = [0] * (max(sample.group_of) + 1)
    rounds: list[tuple[int, int, int]] = []
    for expert in lowest_first(scores):
        group = sample.group_of[expert]
        rounds.append((turn[group], len(rounds), expert))
        turn[group] += 1
    order = [expert for _, _, expert in sorted(rounds)][: sample.num_experts - fewest_experts(sample.layer)]
    return Ranking(order, [float(scores[expert]) for expert in order])
