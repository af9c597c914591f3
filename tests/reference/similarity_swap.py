"""Swaps done the slow way: another model is made, whose state dict has the weights where the swap would put them."""

import copy

import torch
from torch import nn

from lamella.backbones.moe import moe_layers


def swapped_model(model: nn.Module, a, b, unit: str, exchange: bool) -> nn.Module:
    """A copy of the model with the state of ``b`` at ``a`` and, in an exchange, that of ``a`` at ``b``."""
    other = copy.deepcopy(model)
    if unit == "expert":
        _put_expert(model, other, a, b)
        if exchange:
            _put_expert(model, other, b, a)
        return other
    before = model.state_dict()
    state = {name: tensor.clone() for name, tensor in before.items()}
    for source, target in zip(_prefixes(model, a, unit), _prefixes(model, b, unit), strict=True):
        for name in before:
            if name.startswith(source):
                state[name] = before[target + name.removeprefix(source)].clone()
            if exchange and name.startswith(target):
                state[name] = before[source + name.removeprefix(target)].clone()
    other.load_state_dict(state)
    return other


def _put_expert(model: nn.Module, other: nn.Module, place, numbers) -> None:
    here = {layer.index: layer for layer in moe_layers(other)}[place[0]].experts[place[1]]
    there = {layer.index: layer for layer in moe_layers(model)}[numbers[0]].experts[numbers[1]]
    here.write(there)


def _prefixes(model: nn.Module, layer: int, unit: str) -> list[str]:
    moe = {one.index: one for one in moe_layers(model)}[layer]
    wanted = {
        "router": [moe.router_module],
        "router+experts": [moe.router_module, moe.experts_module],
        "block": [moe.block],
    }[unit]
    names = {id(module): name for name, module in model.named_modules()}
    return [f"{names[id(module)]}." for module in wanted]


def ratio_draws(difference, weights, resamples: int, seed: int) -> torch.Tensor:
    """The bootstrap draw by draw: texts with replacement, then one division."""
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(resamples):
        rows = torch.randint(len(difference), (len(difference),), generator=generator)
        draws.append(difference[rows].sum() / weights[rows].sum())
    return torch.stack(draws)
