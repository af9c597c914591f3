"""PEFT's merges of several LoRAs into one. Nothing is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lamella.errors import LamellaError
from lamella.lab.methods.base import Built
from lamella.lab.methods.compositions import Loras, Target, composition

Combination = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


@composition("peft-merge")
def peft_merge(
    loras: Loras,
    target: Target,
    combination: Combination,
    weight: Annotated[float | None, Field(description="of every LoRA; 1/K if absent")] = None,
    density: Annotated[
        float, Field(gt=0.0, le=1.0, description="share that ties, dare and magnitude_prune keep")
    ] = 0.5,
    svd_rank: Annotated[
        int | None, Field(gt=0, description="of the svd forms; the largest rank of the LoRAs if absent")
    ] = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Built:
    """PEFT's `add_weighted_adapter`.

    ``linear``, ``ties``, ``dare_*`` and ``magnitude_prune`` work on A and B by themselves, so that cross terms appear;
    ``cat`` and ``svd`` on the deltas. DARE drops at random, by the run's seed.

    Raises:
        LamellaError: PEFT cannot merge these.
    """
    # PEFT refuses names with dots, and reserves none of these
    inside = {f"lora_{index}": modules for index, modules in enumerate(loras.values())}
    model = target.with_loras(inside)
    weight = 1.0 / len(loras) if weight is None else weight
    try:
        model.add_weighted_adapter(
            list(inside),
            [weight] * len(inside),
            "default",
            combination_type=combination,
            svd_rank=svd_rank,
            svd_full_matrices=False,
            density=density,
            majority_sign_method=majority_sign_method,
        )
    except (ValueError, RuntimeError) as error:
        raise LamellaError(f"PEFT cannot merge these LoRAs by {combination}: {error}") from error
    model.set_adapter("default")
    for name in inside:
        model.delete_adapter(name)
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.contiguous()  # of an SVD they are not, and would multiply otherwise once saved
    return Built(model)
