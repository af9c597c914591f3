"""The experts that a model came with, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lamella.backbones.moe import Expert, MoELayer, moe_layers
from lamella.errors import LamellaError
from lamella.similarity.screening.pairs import Name


def native_layers(model: nn.Module) -> dict[int, MoELayer]:
    """The layers of a model by index.

    Raises:
        LamellaError: the model has none, or its experts are an adapter's.
    """
    layers = moe_layers(model)
    if foreign := next((layer for layer in layers if not layer.family.native), None):
        raise LamellaError(
            f"The experts of {foreign.name} are an adapter's; give a model that came with its experts, without adapter."
        )
    return {layer.index: layer for layer in layers}


def find_experts(layers: Mapping[int, MoELayer], names: Sequence[Name]) -> dict[Name, Expert]:
    """Experts by name.

    Raises:
        LamellaError: there is no name, or one that the model does not have.
    """
    if not names:
        raise LamellaError("No expert is named; name experts as (layer, expert).")
    for layer, expert in names:
        if layer not in layers or not 0 <= expert < layers[layer].num_experts:
            has = ", ".join(f"{index} (0 to {one.num_experts - 1})" for index, one in layers.items())
            raise LamellaError(
                f"The model has no expert {expert} of layer {layer}; its layers, with their experts: {has}."
            )
    return {(layer, expert): layers[layer].experts[expert] for layer, expert in names}
