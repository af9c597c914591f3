"""How alike the experts of a module are, whatever basis their factors happen to be written in."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError, optional_module
from lamella.tuners.routed import RoutedLayer, routed_layers, routed_modules

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("stack", "layer", "module", "raw", "normalised")


@torch.no_grad()
def redundancy(model: nn.Module, adapter: str | None = None) -> "pd.DataFrame":
    """Distance between the experts of each module, a row per module with at least two.

    ``raw`` is the mean over pairs of ``s * ||B_a A_a - B_b A_b||_F``, with s the adapter's scaling; it grows with the
    size of the updates, so ``normalised`` divides it by their mean norm: 0 where all experts do the same, about 1.4 for
    orthogonal ones of one size, NaN where all are zero still. Both depend on the products B A alone, not on how they
    are factored. Computed in float64 from r x r Gram matrices; nothing of size out x in is formed.
    Source: MoLA, definition 6.1, which leaves open whether A, B or B A is meant.

    Args:
        model: with an adapter that trains LoRA experts, such as MoLA's.
        adapter: its name; the active ones when None.

    Returns:
        Columns stack, layer, module, raw, normalised.

    Raises:
        LamellaError: the model has no such adapter, or pandas is not installed.
    """
    pd = optional_module("pandas", "lamella.redundancy")
    layers = lora_experts(model, adapter)
    if not layers:
        named = "active adapter" if adapter is None else f"adapter {adapter!r}"
        raise LamellaError(f"{type(model).__name__} has no {named} with LoRA experts, so there is nothing to compare.")
    rows = [(layer.place.stack, layer.place.layer, layer.place.module, *distances(layer)) for layer in layers]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def lora_experts(model: nn.Module, adapter: str | None = None) -> list[RoutedLayer]:
    """The routers of an adapter, or of the active ones, that choose from LoRA experts which the adapter trains."""
    if adapter is None:
        layers = routed_layers(model)
    else:
        asked = (module.routed_layer(adapter) for module in routed_modules(model))
        layers = [layer for layer in asked if layer is not None]
    return [layer for layer in layers if layer.factors]


def distances(layer: RoutedLayer) -> tuple[float, float]:
    """The raw and the normalised mean distance between one module's experts, as `redundancy` has them."""
    A, B = (factor.double() for factor in layer.numbers())
    products = _inner_products(A, B)  # (E, E)
    squares = products.diagonal()  # (E,)
    squared = squares[:, None] + squares[None, :] - 2 * products  # (E, E)
    first, second = torch.triu_indices(len(A), len(A), offset=1)
    raw = layer.scaling * float(squared[first, second].clamp_min(0).sqrt().mean())
    norm = layer.scaling * float(squares.clamp_min(0).sqrt().mean())
    return raw, raw / norm if norm > 0 else float("nan")


def _inner_products(A: Tensor, B: Tensor) -> Tensor:
    """``<B_a A_a, B_b A_b> = sum((B_a^T B_b) * (A_a A_b^T))`` of all pairs, ``(E, E)``."""
    down = torch.einsum("ari,bsi->abrs", A, A)
    up = torch.einsum("aor,bos->abrs", B, B)
    return (up * down).sum(dim=(2, 3))
