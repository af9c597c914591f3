"""How a swap changes what the routers choose."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lamella.backbones.blocks import Place
from lamella.backbones.modes import evaluating
from lamella.backbones.offloading import input_device
from lamella.similarity.swapping.exchange import Aligners, swap
from lamella.similarity.swapping.scores import Batch, inputs_on
from lamella.similarity.swapping.units import Named, Unit, mixtures
from lamella.tracing import NATIVE, record_routing

if TYPE_CHECKING:
    import pandas as pd


def routing_shift(
    model: nn.Module,
    batches: Iterable[Batch],
    a: Named,
    b: Named,
    unit: Unit = "expert",
    exchange: bool = True,
    aligner: Aligners | None = None,
) -> "pd.DataFrame":
    """What every expert of every layer is chosen for, before the swap and inside it.

    Args:
        model: a model with a mixture of experts.
        batches: what the model is called with; padding does not count.
        a: the first to swap; this and the rest as for ``swap``.
        b: the second.
        unit: what changes places.
        exchange: both ways.
        aligner: what tokens pass before a strange expert.

    Returns:
        A row per layer and expert: layer, expert, share_before, share_after (of the choices of the layer's router for
        real tokens; they sum to 1 over its experts), dropped_before, dropped_after (choices that the expert had no
        room for; they are in no share).

    Raises:
        LamellaError: as ``swap``.
    """
    listed = list(batches)
    before = _shares(model, listed)
    with swap(model, a, b, unit, exchange, aligner):
        after = _shares(model, listed)
    return before.merge(after, on=["layer", "expert"], suffixes=("_before", "_after"), validate="one_to_one")


def _shares(model: nn.Module, batches: Sequence[Batch]) -> "pd.DataFrame":
    """layer, expert, share, dropped: what the routers that the model came with did with these batches."""
    device = input_device(model)
    with evaluating(model), torch.no_grad(), record_routing(model) as trace:
        for batch in batches:
            model(**inputs_on(device, batch))
    frame = trace.frame
    frame = frame[frame["adapter"] == NATIVE]
    index = {layer.place: layer.index for layer in mixtures(model).values()}
    places = map(Place, frame["stack"], frame["layer"], frame["module"])
    shares = frame.assign(layer=[index[place] for place in places])[["layer", "expert", "share", "dropped"]]
    return shares.sort_values(["layer", "expert"], ignore_index=True)
