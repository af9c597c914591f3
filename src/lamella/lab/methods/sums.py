"""Compositions that are sums of LoRAs, of their deltas or of their factors. Nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field

from lamella.adapters import Factors
from lamella.errors import LamellaError
from lamella.lab.methods.compositions import Loras, Modules, composition
from lamella.lab.schema import unknown_key


@composition("single")
def single(loras: Loras, adapter: str) -> Modules:
    """One of the trained LoRAs, as it is.

    Raises:
        LamellaError: there is none of that name.
    """
    if adapter not in loras:
        raise LamellaError(unknown_key(adapter, loras, "adapters.").replace("setting", "LoRA", 1))
    return loras[adapter]


@composition("uniform")
def uniform(loras: Loras) -> Modules:
    """The mean of the LoRAs' deltas: normalised linear arithmetic (MOLE, eq. 2)."""
    return weighted_sum(loras, dict.fromkeys(loras, 1.0 / len(loras)))


@composition("sum")
def total(loras: Loras) -> Modules:
    """The sum of the LoRAs' deltas (MOLE, eq. 1)."""
    return weighted_sum(loras, dict.fromkeys(loras, 1.0))


@composition("pem")
def pem(
    loras: Loras,
    weights: Annotated[dict[str, float], Field(description="by name; 1/K each if absent")] = {},  # noqa: B006
) -> Modules:
    """Addition and negation of LoRAs, factor by factor: A and B are each weighted and added.

    A negative weight is negation followed by addition: the sign goes to B alone, since that of both would cancel. The
    cross terms ``B_i A_j`` belong to the published method; with weights 1/K the terms ``B_i A_i`` have the weight 1/K².

    Source: Zhang et al., Composing Parameter-Efficient Modules with Arithmetic Operations, NeurIPS 2023, §3.

    Raises:
        LamellaError: factors do not correspond, or weights are not those of the LoRAs.
    """
    weights = weights or dict.fromkeys(loras, 1.0 / len(loras))
    if weights.keys() != loras.keys():
        odd = sorted(weights.keys() ^ loras.keys())[0]
        raise LamellaError(f"weights and adapters must name the same LoRAs; {odd!r} is in one of them only.")
    return factor_sum(loras, {name: abs(weight) for name, weight in weights.items()}, weights)


def weighted_sum(loras: Mapping[str, Modules], weights: Mapping[str, float]) -> Modules:
    """The LoRA whose delta is ``sum_i w_i s_i B_i A_i`` exactly: factors side by side, so that ranks add up.

    Args:
        loras: any ranks, scalings and modules; a LoRA adds nothing where it has no factors.
        weights: w by name; a LoRA without one is left out.
    """
    total: Modules = {}
    for module in dict.fromkeys(module for name in weights for module in loras[name]):
        parts = [(loras[name][module], weight) for name, weight in weights.items() if module in loras[name]]
        total[module] = Factors(
            A=torch.cat([factors.A.float() for factors, _ in parts]),
            B=torch.cat([weight * factors.scaling * factors.B.float() for factors, weight in parts], dim=1),
            scaling=1.0,
        )
    return total


def factor_sum(loras: Mapping[str, Modules], down: Mapping[str, float], up: Mapping[str, float]) -> Modules:
    """The LoRA ``s (sum_i up_i B_i)(sum_i down_i A_i)``: factors added one by one, cross terms and all.

    Raises:
        LamellaError: modules, ranks or scalings differ, so that factors do not correspond.
    """
    names = list(down)
    first = loras[names[0]]
    for name in names[1:]:
        for module in first.keys() | loras[name].keys():
            _check_alike(module, (names[0], first.get(module)), (name, loras[name].get(module)))
    return {
        module: Factors(
            A=torch.stack([down[name] * loras[name][module].A.float() for name in names]).sum(0),
            B=torch.stack([up[name] * loras[name][module].B.float() for name in names]).sum(0),
            scaling=factors.scaling,
        )
        for module, factors in first.items()
    }


def _check_alike(module: str, one: tuple[str, Factors | None], other: tuple[str, Factors | None]) -> None:
    said = [
        f"{name}: " + ("none" if factors is None else f"rank {len(factors.A)}, scaling {factors.scaling:g}")
        for name, factors in (one, other)
    ]
    if said[0].partition(": ")[2] != said[1].partition(": ")[2]:
        raise LamellaError(
            f"Adding the factors of LoRAs needs the same modules, ranks and scalings, but in {module} there is "
            f"{said[0]}; {said[1]}. Use 'uniform' or 'sum', which add the deltas themselves."
        )
