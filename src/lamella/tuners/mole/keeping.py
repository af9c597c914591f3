"""Decisions taken at prefill, kept with the model's cache, so that a sequence goes on as it began.

A decision must go wherever its sequence's keys go: reordered by beam search, repeated, selected, forgotten on reset. So
the cache itself is made to carry it: it becomes an instance of its own class with the decisions beside its layers.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lamella.routing import RoutedCall

Key = tuple[str, str]  # adapter, unit


@dataclass(frozen=True, eq=False)
class Kept:
    """One unit's decision for the sequences in a cache.

    Attributes:
        logits: ``(batch, K)``.
        complete: whether all that the decision is meant to read was there; if not, the sequence may not be continued.
    """

    logits: Tensor
    complete: bool

    def by(self, choose: Callable[[Tensor], Tensor]) -> "Kept":
        """The decision of a batch made of these rows in another way."""
        return Kept(choose(self.logits), self.complete)


class DecisionKeeper:
    """Takes decisions out of the cache that a call is given, and puts new ones into the one it leaves."""

    def opened(self, call: RoutedCall, arguments: Mapping[str, Any]) -> None:
        """Notes what the cache brings: the decisions taken, and how many tokens have been read."""
        cache = arguments.get("past_key_values")
        if isinstance(cache, Cache):
            call.cached = dict(getattr(cache, "lamella_kept", {}))
            call.past = int(cache.get_seq_length())
            call.cache = cache

    def closed(self, call: RoutedCall, output: Any) -> None:
        """Gives the cache the decisions that were taken."""
        kept = call.cached
        cache = call.cache or getattr(output, "past_key_values", None)
        call.cache = None
        if kept and isinstance(cache, Cache):
            if not isinstance(cache, _Carrying):
                carrying: Any = _carrying
                cache.__class__ = carrying(type(cache))
            cache.lamella_kept = kept


def kept_decision(call: RoutedCall, key: Key) -> Kept | None:
    """What an earlier forward decided for the sequences of this call."""
    kept: Kept | None = call.cached.get(key) if call.past else None
    return kept


def keep_decision(call: RoutedCall, key: Key, kept: Kept) -> None:
    """Notes a decision for the forwards that go on with these sequences."""
    call.cached[key] = kept


class _Carrying:
    """What a cache needs to carry decisions along."""

    lamella_kept: dict[Key, Kept]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.lamella_kept = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._choose(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._choose(lambda rows: rows[torch.as_tensor(indices).to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._choose(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def _choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.lamella_kept = {key: kept.by(choose) for key, kept in self.lamella_kept.items()}


@functools.lru_cache(maxsize=64)
def _carrying(cache: type[Cache]) -> type[Cache]:
    return type(cache.__name__, (_Carrying, cache), {"__module__": cache.__module__})
