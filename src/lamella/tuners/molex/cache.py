"""What MoLEx's guests keep of the sequences so far, in the model's own cache.

A guest that runs at depth t attends to what it saw at depth t before, and its keys are not those that block t or the
guest in its own place has computed. So each guest at each depth has a layer of its own, of the kind of block t's, for
the rows of the batch that chose it. They lie together in one more layer of the cache, so whatever is done to the cache
(beam search, crop, reset, copying) is done to them. Which guests were chosen, ``lamella.tuners.cache`` keeps beside
them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin, StaticLayer

from lamella.errors import LamellaError
from lamella.tuners.cache import DecisionLayer
from lamella.tuners.molex.guests import States

_EXTENDED = (DynamicCache, StaticCache, QuantizedCache)  # each is a list of layers and nothing more


def guest_slots(cache: Cache, num_blocks: int) -> "GuestSlots":
    """Finds what guests keep in a cache, with room for it made the first time.

    The cache is extended in place by one layer behind those of the blocks, also when a dynamic cache has not made the
    blocks' own yet. An encoder-decoder cache is extended in both of its parts, since a guest projects the encoder's
    states by weights of its own.

    Raises:
        LamellaError: the cache is of a class that cannot be extended.
    """
    obstacle = next((why for part in _parts(cache) if (why := _obstacle(part)) is not None), None)
    if obstacle is not None:
        raise LamellaError(
            f"MoLEx keeps its guests' keys and values in the model's cache, and {obstacle}. Use "
            "cache_implementation='dynamic' (or 'static'), or pass use_cache=False."
        )
    own, *cross = (_guests(part, num_blocks) for part in _parts(cache))
    return GuestSlots(num_blocks, own, cross[0] if cross else None)


def can_extend(cache: Any) -> bool:
    """Whether a cache can hold what guests keep too."""
    return all(_obstacle(part) is None for part in _parts(cache))


def _obstacle(cache: Any) -> str | None:
    """Why a cache cannot be extended; None where it can."""
    name = type(cache).__name__
    if type(cache) not in _EXTENDED:
        return f"does not know how to in a {name}"
    return f"cannot in an offloaded {name}" if cache.offloading else None


def is_static(cache: Any) -> bool:
    """Whether a cache has its full length from the start, which the masks of its model fit."""
    return any(isinstance(layer, StaticLayer) for part in _parts(cache) for layer in getattr(part, "layers", ()))


@dataclass
class Kept:
    """What one guest at one depth keeps: ``rows (R,)`` of the batch, a cache's layer for them, and states beside it."""

    rows: Tensor
    layer: Any
    states: States = field(default_factory=dict)


class GuestsLayer(DummyLayer):
    """The layer of a cache that holds what guests keep, by depth and guest.

    Attributes:
        empty: an empty layer of the kind of each block's own.
        kept: by depth and guest.
        batch: rows of the batch.
    """

    def __init__(self, empty: list[Any]) -> None:
        super().__init__()
        self.is_sliding = all(getattr(layer, "is_sliding", False) for layer in empty)
        self.empty = empty
        self.kept: dict[tuple[int, int], Kept] = {}
        self.batch = 0

    def of(self, depth: int, guest: int, rows: Tensor | None, batch: int) -> Any:
        """The layer of a guest for these rows of the batch, None for all."""
        if depth >= len(self.empty):
            raise LamellaError(
                f"This cache was made for {len(self.empty)} blocks, and block {depth} runs with it: it belongs to "
                "another model. Start from an empty cache, or pass use_cache=False."
            )
        self.batch = batch
        if (depth, guest) not in self.kept:
            here = torch.arange(batch) if rows is None else rows.cpu()
            self.kept[depth, guest] = Kept(here, copy.deepcopy(self.empty[depth]))
        kept = self.kept[depth, guest]
        has_seen = len(kept.rows) == batch if rows is None else torch.equal(kept.rows, rows.cpu())
        if not has_seen:
            raise LamellaError(
                f"Block {guest} runs as a guest at block {depth} for rows of the batch that had not chosen it, so that "
                "it has seen nothing of them. Start from an empty cache, or pass use_cache=False."
            )
        return kept.layer

    def forget(self, depth: int) -> None:
        """Forgets the sequences at one depth, where others begin."""
        self.kept = {place: kept for place, kept in self.kept.items() if place[0] != depth}

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses a block that takes this layer for its own."""
        raise LamellaError(
            "A block writes its keys and values where MoLEx's guests keep theirs: the cache was made for fewer blocks "
            "than the model has. Start from an empty cache, or pass use_cache=False."
        )

    def activate_past_recording(self) -> None:
        """Has windows and convolutions keep what a crop would bring back."""
        for layer in (*self.empty, *(kept.layer for kept in self.kept.values())):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end."""
        for kept in self.kept.values():
            kept.layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forgets the sequences."""
        self.kept = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the rows in the order of the beams."""
        self._choose(lambda rows: rows[beam_idx.cpu()])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._choose(lambda rows: rows[torch.as_tensor(indices).cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._choose(lambda rows: rows.repeat_interleave(repeats))

    def _choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        if not self.kept:
            return
        chosen = choose(torch.arange(self.batch))  # (new batch,): which row each was
        self.batch = len(chosen)
        for place, kept in list(self.kept.items()):
            has, at = (chosen[:, None] == kept.rows).nonzero().T  # each new row, and where its states lie
            kept.rows = has
            kept.layer.reorder_cache(at)
            kept.states = {name: state if state is None else state[at] for name, state in kept.states.items()}
            if len(has) == 0:
                del self.kept[place]


@dataclass(frozen=True)
class GuestSlots:
    """What guests keep in one cache: of their own attention, and of the encoder's states where there are any."""

    num_blocks: int
    own: GuestsLayer
    cross: GuestsLayer | None

    def begin(self, depth: int) -> None:
        """Makes room for new sequences at one depth."""
        for layer in (self.own, self.cross):
            if layer is not None:
                layer.forget(depth)

    def has_all(self, depth: int, guest: int, batch: int) -> bool:
        """Whether a guest has seen every row at this depth, as where its first call could not be cut."""
        kept = self.own.kept.get((depth, guest))
        return kept is not None and len(kept.rows) == batch

    def states(self, depth: int, guest: int) -> States:
        """What a guest at this depth keeps in itself, of the rows of its view."""
        return self.own.kept[depth, guest].states

    def view(
        self,
        depth: int,
        guest: int,
        rows: Tensor | None,
        batch: int,
        past: int | None = None,
        blocks: int | None = None,
    ) -> Cache:
        """What a guest at this depth is given as its cache; it serves one call.

        Args:
            depth: the block at whose side the guest runs.
            guest: its own index in the stack.
            rows: (R,) int64 indices into the batch, each at most once; None for all.
            batch: rows of the batch.
            past: how many tokens of the sequences it has to have seen; None where that is unknown.
            blocks: how many the guest's own model has; as many as the stack unless given.

        Raises:
            LamellaError: it has seen others, or the rows had not chosen it.
        """
        layer = self.own.of(depth, guest, rows, batch)
        if past is not None and isinstance(layer, CacheLayerMixin) and (seen := int(layer.get_seq_length())) != past:
            raise LamellaError(
                f"The cache holds {past} tokens of the sequence, but a MoLEx guest has seen only {seen} of them: part "
                "of it was filled while the adapter was off, or by a model without it. Start from an empty cache, or "
                "pass use_cache=False."
            )
        view = GuestView(layer, blocks or self.num_blocks)
        if self.cross is None:
            return view
        return EncoderDecoderCache(view, GuestView(self.cross.of(depth, guest, rows, batch), self.num_blocks))


class GuestView(Cache):
    """One guest's layer at one depth as a cache: whatever its index in the stack, it is this one."""

    def __init__(self, layer: Any, num_blocks: int) -> None:
        super().__init__(layers=[layer] * num_blocks)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As any cache; under autocast values need not be of the precision of keys, which a layer takes for both."""
        states = super().update(key_states, value_states.to(key_states.dtype), layer_idx, *args, **kwargs)
        return states[0], states[1]


def _parts(cache: Any) -> tuple[Any, ...]:
    if type(cache) is EncoderDecoderCache:
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def _guests(cache: Cache, num_blocks: int) -> GuestsLayer:
    """The guests' layer of a cache, added the first time."""
    layers: list[Any] = cache.layers
    found = next((layer for layer in layers if isinstance(layer, GuestsLayer)), None)
    if found is not None:
        return found
    while cache.layer_class_to_replicate is not None and len(layers) < num_blocks:
        layers.append(cache.layer_class_to_replicate())
    own = [layer for layer in layers if not isinstance(layer, DecisionLayer)]
    guests = GuestsLayer([_emptied(layer) for layer in own[:num_blocks]])
    layers.append(guests)
    return guests


def _emptied(layer: Any) -> Any:
    """A layer of the same kind and size that holds nothing, and knows of no number of rows."""
    graph = [held for held in tree_leaves(vars(layer)) if isinstance(held, Tensor) and held.requires_grad]
    empty = copy.deepcopy(layer, {id(held): held.detach().clone() for held in graph})  # which deepcopy itself refuses
    empty.reset()
    if isinstance(empty, CacheLayerMixin):
        empty.keys = empty.values = None
        empty.is_initialized = False
    if isinstance(empty, LinearAttentionCacheLayerMixin):
        LinearAttentionCacheLayerMixin.__init__(empty, layer.number_of_states)
        empty.record_past = layer.record_past
    return empty
