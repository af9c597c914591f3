"""Layers' own losses as return values, for a training loop that adds them itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lamella.errors import LamellaError


@dataclass
class CollectedLoss:
    """The layers' own losses of the forwards inside ``collect_losses``, as differentiable scalars, by module name."""

    by_name: list[tuple[str, Tensor]] = field(default_factory=list)

    def total(self) -> Tensor:
        """Their sum, each already multiplied by its coefficient and its router's share of the block."""
        if not self.by_name:
            raise LamellaError(
                "No balance loss was collected: run a training-mode forward with gradients of a model whose config has "
                "balance_coef or z_coef above 0 inside `with collect_losses() as losses:`."
            )
        return torch.stack([loss for _, loss in self.by_name]).sum()


_COLLECTING: ContextVar[CollectedLoss | None] = ContextVar("lamella_collecting", default=None)


@contextmanager
def collect_losses() -> Iterator[CollectedLoss]:
    """Returns the layers' losses instead of attaching them, for a training loop that adds them itself."""
    collected = CollectedLoss()
    token = _COLLECTING.set(collected)
    try:
        yield collected
    finally:
        _COLLECTING.reset(token)


def current_collection() -> CollectedLoss | None:
    """Where the losses of a forward that starts now go; None when they are attached."""
    return _COLLECTING.get()
