"""What of a model can change places: an expert, a router, a router with its experts, a whole block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal, get_args

from torch import Tensor, nn

from lamella.backbones.blocks import locate_stacks
from lamella.backbones.moe import MoELayer, moe_layers
from lamella.backbones.moe.expert import OFFLOADED, CopiedExpert
from lamella.backbones.offloading import is_offloaded
from lamella.errors import LamellaError

Unit = Literal["expert", "router", "router+experts", "block"]
Named = int | tuple[int, int]  # a layer, or one expert of a layer


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a model that can change places with another of its unit.

    Attributes:
        unit: what it is.
        layer: index of its block, counted through the stacks of the model, the encoder's first.
        expert: which expert of the layer; -1 where the unit is not a single expert.
        modules: the modules it lies in, by dotted name.
        tensors: what it holds, by name.
        moe: the mixture of experts it belongs to; None where it is a block.
    """

    unit: Unit
    layer: int
    expert: int
    modules: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    moe: MoELayer | None

    def __str__(self) -> str:
        what = f"expert {self.expert} of layer {self.layer}" if self.expert >= 0 else f"the {self.unit} {self.layer}"
        kind = "" if self.moe is None else f", {self.moe.num_experts} experts"
        return f"{what} ({' + '.join(self.modules)}{kind})"


def find_part(model: nn.Module, unit: Unit, named: Named) -> Part:
    """The part of that unit at a layer; of (layer, expert) only the layer counts where the unit is not an expert.

    Raises:
        LamellaError: an unknown unit, a layer or an expert that the model does not have.
    """
    if unit not in get_args(Unit):
        raise LamellaError(f"unit={unit!r} is not one of {', '.join(get_args(Unit))}.")
    layer, expert = named if isinstance(named, tuple) else (named, -1)
    if unit == "block":
        return _block(model, layer)
    layers = mixtures(model)
    if layer not in layers:
        raise LamellaError(
            f"Layer {layer} has no mixture of experts, so it has no {unit} to swap; those that have one are "
            f"{', '.join(map(str, layers))}."
        )
    moe = layers[layer]
    if unit == "expert":
        return _expert(model, moe, expert)
    if unit == "router":
        return _of_modules(model, unit, layer, {"router": moe.router_module}, moe)
    if not moe.family.native:
        raise LamellaError(
            f"The experts of {moe.name} are an adapter's and lie in one module with what they are added to, so they "
            "do not change places as a whole; swap with unit='router' or unit='expert'."
        )
    return _of_modules(model, unit, layer, {"router": moe.router_module, "experts": moe.experts_module}, moe)


def mixtures(model: nn.Module) -> dict[int, MoELayer]:
    """The mixture of experts of each block that has one, by the block's index; the model's own before an adapter's.

    Raises:
        LamellaError: the model has none, or an adapter has several in one block.
    """
    layers = moe_layers(model)
    layers = [layer for layer in layers if layer.family.native] or layers
    by_block = {layer.index: layer for layer in layers}
    if len(by_block) < len(layers):
        one = next(layer for layer in layers if by_block[layer.index] is not layer)
        raise LamellaError(
            f"Block {one.index} has several mixtures of experts ({one.name}, {by_block[one.index].name}, ...), and a "
            "swap names a mixture by its block alone; route in one module of a block, or swap with unit='block'."
        )
    return by_block


def pair_tensors(model: nn.Module, first: Part, second: Part) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two parts that stand for each other; none where a part stands for itself.

    A weight that both parts share is in both places already.

    Raises:
        LamellaError: the parts differ in structure, shapes, dtypes or devices, or share weights with other parts.
    """
    if (first.layer, first.expert) == (second.layer, second.expert):
        return []
    if difference := _difference(first, second):
        raise LamellaError(
            f"Swapping {first} and {second} is not possible: {difference}. Swap two that are built alike; "
            "lamella.similarity.swapping.layer_pairs lists the layers that are."
        )
    pairs = {(id(one), id(second.tensors[name])): (one, second.tensors[name]) for name, one in first.tensors.items()}
    _refuse_ties(model, first, second, list(pairs))
    return [(one, other) for one, other in pairs.values() if one is not other]


def fits(first: Part, second: Part) -> bool:
    """Whether two parts are built alike, so that one can take the other's place."""
    return _difference(first, second) is None


def _block(model: nn.Module, layer: int) -> Part:
    blocks = [
        model.get_submodule(f"{stack.name}.{at}" if stack.name else str(at))
        for stack in locate_stacks(model)
        for at in range(stack.depth)
    ]
    if not 0 <= layer < len(blocks):
        raise LamellaError(f"There is no block {layer}: {type(model).__name__} has the blocks 0 to {len(blocks) - 1}.")
    return _of_modules(model, "block", layer, {"block": blocks[layer]}, None)


def _expert(model: nn.Module, moe: MoELayer, expert: int) -> Part:
    if not 0 <= expert < moe.num_experts:
        raise LamellaError(
            f"Layer {moe.index} ({moe.name}) has the experts 0 to {moe.num_experts - 1}, not {expert}; name an expert "
            "as (layer, expert)."
        )
    modules = _names(model, [moe.experts_module])
    _refuse_offloaded(modules)
    made = moe.experts[expert]
    if isinstance(made, CopiedExpert):
        raise LamellaError(made.why)
    return Part("expert", moe.index, expert, modules, made.matrices, moe)


def _of_modules(model: nn.Module, unit: Unit, layer: int, chosen: dict[str, nn.Module], moe: MoELayer | None) -> Part:
    tensors = {f"{prefix}.{name}": tensor for prefix, module in chosen.items() for name, tensor in _tensors(module)}
    modules = _names(model, chosen.values())
    _refuse_offloaded(modules)
    return Part(unit, layer, -1, modules, tensors, moe)


def _refuse_offloaded(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if any(map(is_offloaded, module.modules())):
            raise LamellaError(f"Weights of {name} are offloaded by accelerate, {OFFLOADED}")


def _names(model: nn.Module, chosen: Iterable[nn.Module]) -> dict[str, nn.Module]:
    wanted = {id(module) for module in chosen}
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, a tied one under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _difference(first: Part, second: Part) -> str | None:
    """The first thing in which two parts are built differently, in words."""
    mine, theirs = first.tensors, second.tensors
    for have, lack, at in ((mine, theirs, second), (theirs, mine, first)):
        if missing := [name for name in have if name not in lack]:
            return f"{at} has no {missing[0]}"
    for name, one in mine.items():
        other = theirs[name]
        for what in ("shape", "dtype", "device"):
            if getattr(one, what) != getattr(other, what):
                return f"their {name} differ in {what}, {_words(one, what)} and {_words(other, what)}"
    return None


def _words(tensor: Tensor, what: str) -> str:
    return str(tuple(tensor.shape) if what == "shape" else getattr(tensor, what))


def _refuse_ties(model: nn.Module, first: Part, second: Part, pairs: list[tuple[int, int]]) -> None:
    holders = {id(tensor): part for part in (first, second) for m in part.modules.values() for _, tensor in _tensors(m)}
    inside = tuple(f"{name}." for part in (first, second) for name in part.modules)
    for name, tensor in _tensors(model):
        if id(tensor) in holders and not name.startswith(inside):
            raise LamellaError(
                f"A weight of {holders[id(tensor)]} is tied to {name}, which a swap would change too; untie it first."
            )
    pooled = first.unit == "expert" and first.layer != second.layer and _shared(first, second)
    if pooled or any(len({pair[side] for pair in pairs}) < len(pairs) for side in (0, 1)):
        raise LamellaError(
            f"Weights are tied within or between {first} and {second}, so that a swap would change more than these "
            "two; untie them first."
        )


def _shared(first: Part, second: Part) -> bool:
    mine, theirs = (
        {id(tensor) for module in part.modules.values() for _, tensor in _tensors(module)} for part in (first, second)
    )
    return not mine.isdisjoint(theirs)


RANDOM = -1  # in the place of the second: nobody, the first gets random weights
Swap = tuple[Named, Named]


def layer_pairs(model: nn.Module, unit: Unit, ordered: bool = False) -> list[Swap]:
    """All pairs of mixture-of-experts layers of one stack whose units can take each other's place.

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
