"""How what experts are given and put out is distributed: norms per layer, and tokens in a principal plane."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lamella.backbones.moe import moe_layers
from lamella.backbones.offloading import onloaded
from lamella.errors import optional_module

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture

SIDES = ("input", "output")
_BINS = 30
_QUANTILE = 2**24  # numbers, the most that torch takes the quantile of
_TOKENS_IN_PLANE = 8  # of each expert
_POINTS = 1500  # of a picture


def distributions(capture: Capture, model: nn.Module) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Histograms of norms and tokens in the plane of their two principal components, inputs and outputs apart.

    Returns:
        A row per layer, side and bin: ``layer, side, norm`` (middle of the bin), ``share``; and a row per token:
        ``layer, expert, side, x, y``. The plane is of all layers together, so that they can be compared.
    """
    pd = optional_module("pandas", "A table of norms")

    norms: dict[str, dict[int, list[Tensor]]] = {side: {} for side in SIDES}
    tokens: dict[str, dict[tuple[int, int], Tensor]] = {side: {} for side in SIDES}
    each = max(1, min(_TOKENS_IN_PLANE, _POINTS // max(1, len(capture.experts))))
    for layer in moe_layers(model):
        with onloaded(*layer.experts_module.modules()):
            for expert in range(layer.num_experts):  # one at a time: all tokens of all experts need not fit in memory
                function = layer.experts[expert]
                given = capture.inputs(layer.index, expert)  # (n, h)
                with torch.no_grad():
                    put_out = function(given.to(function.up))
                for side, x in zip(SIDES, (given, put_out), strict=True):
                    norms[side].setdefault(layer.index, []).append(x.float().norm(dim=1).cpu())
                    tokens[side][layer.index, expert] = x[:each].float().cpu()
    shares = [row for side in SIDES for row in _shares(side, norms[side])]
    places = [row for side in SIDES for row in _plane(side, tokens[side])]
    return (
        pd.DataFrame(shares, columns=["layer", "side", "norm", "share"]),
        pd.DataFrame(places, columns=["layer", "expert", "side", "x", "y"]),
    )


def _shares(side: str, parts: dict[int, list[Tensor]]) -> Iterable[tuple[int, str, float, float]]:
    norms = {layer: torch.cat(of_experts) for layer, of_experts in sorted(parts.items())}  # each (n,)
    every = torch.cat(list(norms.values()))
    if not len(every):
        return
    most = every[:: -(-len(every) // _QUANTILE)].quantile(0.995)
    edges = torch.linspace(0.0, float(most) * 1.05 + 1e-9, _BINS + 1)
    for layer, of_layer in norms.items():
        shares = torch.histogram(of_layer.clamp(max=float(edges[-1])), edges).hist / len(of_layer)  # (bins,)
        middles = (edges[1:] + edges[:-1]) / 2
        for middle, share in zip(middles.tolist(), shares.tolist(), strict=True):
            yield layer, side, middle, share


def _plane(side: str, tokens: dict[tuple[int, int], Tensor]) -> Iterable[tuple[int, int, str, float, float]]:
    chosen = {name: x for name, x in tokens.items() if len(x)}
    if len(chosen) < 2:
        return
    stacked = torch.cat(list(chosen.values()))  # (N, h)
    centred = stacked - stacked.mean(dim=0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)  # (k, h), largest first
    at = iter((centred @ components[:2].T).tolist())  # (N, 2)
    for (layer, expert), x in chosen.items():
        for _ in range(len(x)):
            left, top = next(at)
            yield layer, expert, side, left, top
