"""A copy of a model whose layers have fewer experts, and routers fewer rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lamella.backbones.moe import MoELayer, moe_layers
from lamella.errors import LamellaError
from lamella.similarity.compression.calibration import LayerSample

Model = TypeVar("Model", bound=nn.Module)
_PROBES = 64  # random tokens on which a cut router is compared with a masked one


def without_experts(model: Model, kept: Mapping[int, Sequence[int]]) -> Model:
    """A copy of the model in which layers keep only those of their experts; what goes is not copied.

    Whatever has an entry per expert is cut: in the module that holds the experts, in the router, and directly in the
    module around both. Whether that is all that the router decides by is not taken for granted: the cut router must
    decide as the whole one does when it may not choose the others.

    Args:
        model: left as it is.
        kept: experts in ascending order, by layer index.

    Raises:
        LamellaError: a router that cannot be cut so.
    """
    small = cut(model, kept)
    by_index = {layer.index: layer for layer in moe_layers(small)}
    for layer in _touched(model, kept):
        _check(layer, by_index[layer.index], kept[layer.index])
    return small


def cut(model: Model, kept: Mapping[int, Sequence[int]]) -> Model:
    """The same, without a look at what the routers decide: the tensors may hold nothing yet."""
    layers, memo = _touched(model, kept), dict[int, Any]()
    for layer in layers:
        for tensor in _per_expert(layer):
            memo[id(tensor)] = _rows(tensor, kept[layer.index])
        for expert, child in _children(layer):
            if expert not in kept[layer.index]:
                memo[id(child)] = nn.Identity()
    small = copy.deepcopy(model, memo)  # deepcopy takes what the memo holds for an object in that object's place
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        for module in (layer.module, layer.router_module, *layer.router_module.modules(), layer.experts_module):
            _count_anew(small.get_submodule(names[id(module)]), layer.num_experts, len(kept[layer.index]))
        _renumber(small.get_submodule(names[id(layer.experts_module)]), kept[layer.index])
    counts = {(layer.num_experts, len(kept.get(layer.index, ()))) for layer in moe_layers(model)}
    if len(layers) and len(counts) == 1:  # the config can say so
        ((before, now),) = counts
        config: Any = small.config
        for said in (config.get_text_config(), small):
            _count_anew(said, before, now)
    return small


def _touched(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> list[MoELayer]:
    """The layers that lose experts."""
    return [layer for layer in moe_layers(model) if 0 < len(kept.get(layer.index, ())) < layer.num_experts]


def _children(layer: MoELayer) -> Iterator[tuple[int, nn.Module]]:
    """The experts as modules of their own, where they are."""
    held = layer.experts_module
    if isinstance(held, nn.ModuleDict | nn.ModuleList):
        yield from enumerate(held.values() if isinstance(held, nn.ModuleDict) else held)


def _per_expert(layer: MoELayer) -> Iterator[Tensor]:
    """Parameters and buffers with an entry per expert."""
    places = [(layer.router_module, True), (layer.module, False)]
    if not isinstance(layer.experts_module, nn.ModuleDict | nn.ModuleList):
        places.append((layer.experts_module, True))
    for module, inside in places:
        for tensor in (*module.parameters(recurse=inside), *module.buffers(recurse=inside)):
            if tensor.dim() and tensor.shape[0] == layer.num_experts:
                yield tensor


def _rows(tensor: Tensor, kept: Sequence[int]) -> Tensor:
    rows = tensor.detach()[list(kept)].clone()
    return nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows


def _count_anew(said: Any, before: int, now: int) -> None:
    """Sets whatever a module or a config says of the number of experts."""
    for name, value in list(vars(said).items()):
        counts = ("expert" in name and "per_tok" not in name and "shared" not in name) or name == "out_features"
        if counts and type(value) is int and value == before:
            setattr(said, name, now)


def _renumber(held: nn.Module, kept: Sequence[int]) -> None:
    """Takes away the places of experts that were not copied, and counts the others from 0."""
    if isinstance(held, nn.ModuleDict):
        names = list(held)
        experts = [held[names[expert]] for expert in kept]
        held.clear()
        held.update(dict(zip(names, experts, strict=False)))
    elif isinstance(held, nn.ModuleList):
        experts = [held[expert] for expert in kept]
        del held[:]
        held.extend(experts)


def alike(masked: Tensor, cut: Tensor, eps: float) -> bool:
    """Whether gates ``(N, E)`` are the same but for rounding, which in 16 bits decides near ties of some tokens."""
    same = torch.isclose(masked, cut, atol=max(1e-3, 4 * eps)).all(1)
    return float(same.double().mean()) >= (1.0 if eps < 1e-4 else 0.75)


@torch.no_grad()
def _check(layer: MoELayer, small: MoELayer, kept: Sequence[int]) -> None:
    x = torch.randn(_PROBES, layer.experts[0].up.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(layer.experts[0].up)
    gone = sorted(set(range(layer.num_experts)) - set(kept))
    try:
        with layer.mask(gone):
            masked = LayerSample(layer, x, torch.ones(len(x))).gates[:, list(kept)]
        same = alike(masked, LayerSample(small, x, torch.ones(len(x))).gates, torch.finfo(x.dtype).eps)
    except (RuntimeError, IndexError):
        same = False
    if not same or small.num_experts != len(kept):
        raise LamellaError(
            f"The router of layer {layer.index} ({layer.name}, a {type(layer.router_module).__name__}) does not decide "
            "among fewer experts as it does when the others are masked, so it cannot be cut; choose a criterion that "
            "replaces or merges experts and leaves the router as it is."
        )
