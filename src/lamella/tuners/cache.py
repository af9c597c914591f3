"""Decisions for whole sequences, taken at prefill, travel with transformers' cache: one layer of it holds them all.

A sequence goes on as it began, so its decisions must go wherever its keys go: reordered by beam search, repeated,
selected, copied, forgotten on reset. A cache passes all of that on to each of its layers. So the decisions lie in a
layer of their own behind the model's, of the kind that holds no keys. A call takes them out of the cache that it is
given, and leaves there those that it has taken.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DummyLayer

from lamella.errors import LamellaError
from lamella.routing import CachedDecision, RoutedCall, RouterKey


def recall(call: RoutedCall, key: RouterKey, sequences: int) -> CachedDecision | None:
    """What was decided for the sequences that a call continues; None where they begin in it.

    Args:
        call: the running one.
        key: the adapter, and the name of what decides.
        sequences: how many there are.

    Raises:
        LamellaError: the cache holds tokens for which nothing was decided, or decisions for other sequences, or for a
            prompt that had not come to its end.
    """
    if call.past == 0:
        return None
    adapter, name = key
    decision = call.cached.get(key)
    if decision is None:
        raise LamellaError(
            f"The cache holds {call.past} tokens for which {name} has not decided: they were read without the adapter "
            f"{adapter!r}, with fixed weights, or as documents packed into a row. Start from an empty cache, or "
            "pass use_cache=False."
        )
    if not decision.complete:
        raise LamellaError(
            f"{name} decided by the first {call.past} tokens in the cache, and the prompt goes on after them. Give the "
            "prompt in one forward (generate without prefill_chunk_size), say where it ends (lamella.prompt), or pass "
            "use_cache=False."
        )
    if len(decision.tensors[0]) != sequences:
        raise LamellaError(
            f"The cache holds decisions for {len(decision.tensors[0])} sequences, and {name} is given {sequences}. "
            "Repeat or select them by the cache's own methods, or start from an empty cache."
        )
    return decision


class DecisionLayer(DummyLayer):
    """The layer of a cache that holds the decisions for its sequences, by what took them."""

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding  # a model that asks for the first layer of a kind finds its own
        self.decisions: dict[RouterKey, CachedDecision] = {}

    def reset(self) -> None:
        """Forgets the sequences."""
        self.decisions = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the sequences in the order of the beams."""
        self._choose(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some sequences."""
        self._choose(lambda rows: rows[torch.as_tensor(indices).to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        self._choose(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def _choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.decisions = {key: decision.by(choose) for key, decision in self.decisions.items()}


class DecisionsInCache:
    """Takes decisions out of the cache that a call is given, and puts the new ones into the one that it leaves."""

    def opened(self, call: RoutedCall, arguments: Mapping[str, Any]) -> None:
        """Notes what the cache brings: the decisions, and how many tokens have been read."""
        cache = arguments.get("past_key_values")
        if isinstance(cache, Cache):
            layer = _decision_layer(cache)
            call.cache, call.past = cache, int(cache.get_seq_length())
            call.cached = {} if layer is None else dict(layer.decisions)

    def closed(self, call: RoutedCall, output: Any) -> None:
        """Gives the cache the decisions; now it has all of the model's own layers."""
        cache, call.cache = call.cache or _cache_of(output), None
        if not call.cached or cache is None:
            return
        layer = _decision_layer(cache)
        if layer is None:
            layer = DecisionLayer(all(cache.is_sliding))
            _layers(cache).append(layer)
        layer.decisions = call.cached


def _decision_layer(cache: Cache) -> DecisionLayer | None:
    return next((layer for layer in _layers(cache) if isinstance(layer, DecisionLayer)), None)


def _layers(cache: Cache) -> list[Any]:
    layers: list[Any] = cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers
    return layers


def _cache_of(output: Any) -> Cache | None:
    """The cache that a model has made by itself."""
    values = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    return next((value for value in values if isinstance(value, Cache)), None)
