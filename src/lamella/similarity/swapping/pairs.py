"""Which swaps there are to measure."""

from collections.abc import Iterable
from itertools import permutations, product

from torch import nn

from lamella.backbones.blocks import locate_stacks
from lamella.errors import LamellaError
from lamella.similarity.swapping.units import Named, Unit, find_part, fits, mixtures

RANDOM = -1  # in the place of the second: nobody, the first gets random weights
Swap = tuple[Named, Named]


def layer_pairs(model: nn.Module, unit: Unit, ordered: bool = False) -> list[Swap]:
    """All pairs of mixture-of-experts layers of one stack whose units can stand in each other's place.

    Layers of different stacks are left out: between an encoder's and a decoder's there is no distance in depth. Layers
    that are built differently (a block with the relative position bias, another number of experts) are left out too.

    Args:
        model: a model with a mixture of experts.
        unit: "router", "router+experts" or "block".
        ordered: both (i, j) and (j, i), for swaps that go one way.

    Raises:
        LamellaError: no mixture of experts, or the unit is a single expert.
    """
    if unit == "expert":
        raise LamellaError("layer_pairs is about whole layers; list the pairs of experts with expert_pairs.")
    depths = [stack.depth for stack in locate_stacks(model)]
    stack_of = [at for at, depth in enumerate(depths) for _ in range(depth)]
    parts = [find_part(model, unit, layer) for layer in mixtures(model)]
    return [
        (first.layer, second.layer)
        for first, second in permutations(parts, 2)
        if (ordered or first.layer < second.layer)
        and stack_of[first.layer] == stack_of[second.layer]
        and fits(first, second)
    ]


def expert_pairs(model: nn.Module, first_layer: int, second_layer: int) -> list[Swap]:
    """Every expert of one layer with every expert of another; within one layer, every two experts once.

    Raises:
        LamellaError: a layer without experts.
    """
    numbers = {index: layer.num_experts for index, layer in mixtures(model).items()}
    if unknown := [layer for layer in (first_layer, second_layer) if layer not in numbers]:
        raise LamellaError(f"Layer {unknown[0]} has no experts; those that have are {', '.join(map(str, numbers))}.")
    return [
        ((first_layer, one), (second_layer, other))
        for one, other in product(range(numbers[first_layer]), range(numbers[second_layer]))
        if first_layer != second_layer or one < other
    ]


def control_swaps(swaps: Iterable[Swap]) -> list[Swap]:
    """The controls of these swaps: each part with itself (no effect at all), and with random weights instead."""
    parts = list(dict.fromkeys(part for pair in swaps for part in pair if part != RANDOM))
    return [(part, part) for part in parts] + [(part, RANDOM) for part in parts]
