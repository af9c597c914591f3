"""The mixture-of-experts layers of a model."""

from collections.abc import Iterable

from peft import PeftModel
from torch import nn

from lamella.backbones.blocks import Stack, find_place, locate_stacks
from lamella.backbones.causality import role_of
from lamella.backbones.moe.family import FAMILIES, MoEFamily
from lamella.backbones.moe.layer import MoELayer
from lamella.backbones.moe.unknown import explain_unknown
from lamella.compiling import uncompiled
from lamella.errors import LamellaError


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The mixture-of-experts layers of a model, in the order of its blocks, an encoder's before a decoder's.

    Layers of an adapter whose experts are routed are among them. The model may be on the meta device.

    Raises:
        LamellaError: the model has none, or none that lamella knows.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise LamellaError(explain_unknown(model))
    return layers


def find_moe_layers(model: nn.Module, families: Iterable[MoEFamily] = FAMILIES) -> list[MoELayer]:
    """The same, of these families, and an empty list where there are none.

    Raises:
        LamellaError: a layer lies outside every stack of blocks.
    """
    inside, base = _without_peft(model)
    families = list(families)[::-1]  # an exception is registered after the rule
    matches = [
        (name, module, family)
        for name, module in base.named_modules()
        if (known := next((one for one in families if one.holds(module)), None)) is not None
        and (family := known.of(module)) is not None
    ]
    if not matches:
        return []
    stacks = _stacks_around([name for name, _, _ in matches], base)
    first = {stack.name: sum(before.depth for before in stacks[:at]) for at, stack in enumerate(stacks)}
    layers = []
    for name, module, family in matches:
        place = find_place(name, stacks) or find_place(f"{name}.experts", stacks)  # the block itself may hold them
        if place is None:
            raise LamellaError(f"{name} lies outside every stack of blocks of {type(base).__name__}.")
        block = base.get_submodule(f"{place.stack}.{place.layer}" if place.stack else str(place.layer))
        layers.append(MoELayer(first[place.stack] + place.layer, inside + name, family, module, block, place))
    return sorted(layers, key=lambda layer: layer.index)


def _stacks_around(names: Iterable[str], base: nn.Module) -> list[Stack]:
    """The stacks of a model, and after them smaller ones in which these modules lie (an image tower's, say)."""
    stacks = locate_stacks(base)
    for name in names:
        if find_place(f"{name}.experts", stacks) is None:
            parts = name.split(".")
            around = (".".join(parts[:at]) for at in range(1, len(parts)))
            if found := next((one for one in around if isinstance(base.get_submodule(one), nn.ModuleList)), None):
                depth = len(list(base.get_submodule(found).children()))
                role, evidence = role_of(base, found)
                stacks.append(Stack(found, role, depth, "experts", evidence))
    return stacks


def _without_peft(model: nn.Module) -> tuple[str, nn.Module]:
    """The model that an adapter was put on, so that places have the same names with and without one; and the way in."""
    inside = uncompiled(model)
    if not isinstance(inside, PeftModel):
        return "_orig_mod." if inside is not model else "", inside
    base: nn.Module = inside.get_base_model()
    return next(f"{name}." for name, module in model.named_modules() if module is base), base
