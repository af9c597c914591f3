"""Keys and values of MoLEx's guests, kept in the model's own cache.

A guest that runs at depth t attends to what it saw at depth t before, and its keys are not those that block t or the
guest in its own place has computed. So a cache of T blocks gets T more layers: slot T + t holds the guests of depth t.
It holds the whole batch, each row written by the guest chosen for that row; with k guests per row (top-k) their heads
lie side by side. A slot is a layer of the same kind as slot t, so the masks that the model makes fit it, and it lies
among the cache's own layers, so whatever is done to the cache (beam search, crop, reset, copying) is done to the slot.
Which guests were chosen, ``lamella.tuners.cache`` keeps beside them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from lamella.errors import LamellaError
from lamella.tuners.cache import DecisionLayer


def guest_slots(cache: Cache, num_blocks: int) -> "GuestSlots":
    """Finds the guests' slots in a cache, adding them the first time.

    The cache is extended in place: slots T to 2T - 1 stand behind the T of the blocks (T is ``num_blocks``), also when
    a dynamic cache has not made the blocks' own yet. A cache for the first blocks alone, as of a model that exits
    early, gets slots for those. An encoder-decoder cache gets them in both of its parts, since a guest projects the
    encoder's states by weights of its own.

    Raises:
        LamellaError: the cache is of a class that cannot be extended, is offloaded, holds layers of another kind than
            (sliding) attention, or was extended for more blocks.
    """
    own, *cross = (_extended(part, num_blocks) for part in _parts(cache))
    return GuestSlots(num_blocks, own, cross[0] if cross else None)


@dataclass(frozen=True)
class GuestSlots:
    """The slots of the guests in one cache: ``layers`` and ``cross`` are the lists of its layers, own and added."""

    num_blocks: int
    layers: list[Any]
    cross: list[Any] | None

    @property
    def num_own(self) -> int:
        """How many blocks have a layer of their own, before those of the guests."""
        return next(index for index, layer in enumerate(self.layers) if isinstance(layer, GuestLayer))

    def view(self, depth: int, rows: Tensor | None, guests: Tensor) -> Any:
        """What a guest at this depth is given as ``past_key_values``.

        It reads and writes slot T + depth only, and there only the given rows; the states it returns are those rows'.
        One view serves one call of one guest. Which of a row's k places is the guest's own is found by the layer index
        that the guest passes, its index in the stack; with k = 1 that index means nothing.

        Args:
            depth: the block at whose side the guest runs.
            rows: (R,) int64 indices into the batch, each at most once; None for all rows.
            guests: (B, k) int64, the blocks chosen at this depth for all rows of the batch.
        """
        own = self.num_own
        if depth >= own:
            raise LamellaError(
                f"This cache was made for {own} blocks, and block {depth} of {self.num_blocks} runs with it: it "
                "belongs to another model. Start from an empty cache, or pass use_cache=False."
            )
        at = own + depth
        view = GuestView(self, depth, self.layers[at], rows, guests)
        if self.cross is None:
            return view
        return EncoderDecoderView(view, CrossView(self, depth, self.cross[at], rows, guests))

    def past(self, depth: int, new: int) -> int:
        """Tokens seen before this call, which brings ``new``, read off a block whose place in the call is known."""
        last = self.num_own - 1
        if depth < last:
            return int(self.layers[last].get_seq_length())
        return int(self.layers[0].get_seq_length()) - new


class GuestView(Cache):
    """The part of one slot that belongs to some rows, as the cache of the guest that runs on them."""

    def __init__(self, slots: GuestSlots, depth: int, slot: "GuestLayer", rows: Tensor | None, guests: Tensor) -> None:
        super().__init__(layers=_Parts(self, slots.num_blocks))
        self.slots, self.depth, self.slot, self.guests = slots, depth, slot, guests
        self.rows = None if rows is None else rows.cpu()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends (R, H, new, D) keys and values; returns all that these rows hold, as slot t does for its own."""
        if self.slot.lengths is None:
            self.slot.open(len(self.guests), self.guests.shape[1], key_states, value_states)
        past = self.past(key_states.shape[-2])
        # The guests of one slot need not be on one device.
        here, there = key_states.device, self.slot.keys.device
        states = self.slot.write(*self.places(layer_idx), past, key_states.to(there), value_states.to(there))
        return states[0].to(here), states[1].to(here)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that these rows hold of this guest."""
        return 0 if self.slot.lengths is None else self.slot.seen(*self.places(layer_idx))

    def past(self, new: int) -> int:
        """Tokens that the slot has to hold before ``new`` are written."""
        return self.slots.past(self.depth, new)

    def places(self, guest: int) -> tuple[Tensor, Tensor]:
        """Row and column in the slot, (R,) each, of this guest in the view's rows."""
        assert self.slot.lengths is not None
        batch, choices = self.slot.lengths.shape
        rows = torch.arange(batch) if self.rows is None else self.rows
        if choices == 1:
            return rows, torch.zeros_like(rows)
        chosen = self.guests.cpu()[rows] == guest
        if not bool(chosen.any(dim=1).all()):
            raise LamellaError(
                f"Block {guest} runs as a guest at block {self.depth} for rows of the batch that have not chosen it, "
                "so it has no place in the cache there. Generate with use_cache=False."
            )
        return rows, chosen.int().argmax(dim=1)


class CrossView(GuestView):
    """The same for cross-attention, whose keys are written once, when the sequence begins."""

    def past(self, new: int) -> int:
        """Nothing is held before the encoder's states are written."""
        return 0


class EncoderDecoderView(EncoderDecoderCache):
    """A guest's views of the self-attention and the cross-attention, in the shape that decoders ask for."""

    def __init__(self, attention: GuestView, cross: CrossView) -> None:
        self.self_attention_cache, self.cross_attention_cache = attention, cross
        self.is_updated = _Updated(cross)


class _Updated(dict[int, bool]):
    """Whether a guest has written the encoder's states: read off the slot, so that it is right row by row."""

    def __init__(self, cross: CrossView) -> None:
        super().__init__()
        self.cross = cross

    def __getitem__(self, guest: int) -> bool:
        return self.cross.get_seq_length(guest) > 0

    def get(self, guest: int, default: Any = None) -> bool:
        return self[guest]

    def __setitem__(self, guest: int, value: bool) -> None:
        """Nothing to note: the guest says so after it has written, and the slot knows."""


class _Parts(Sequence[Any]):
    """The layers of a view: whatever index a guest asks for, its rows of the slot."""

    def __init__(self, view: GuestView, num_blocks: int) -> None:
        self.view, self.num_blocks = view, num_blocks

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, guest: Any) -> Any:
        if not 0 <= guest < self.num_blocks:
            raise IndexError(guest)
        if self.view.slot.lengths is None:
            return self.view.slot
        return self.view.slot.part(*self.view.places(guest))


class GuestLayer(CacheLayerMixin):
    """What a slot adds to the kind of layer it is: rows written apart from each other.

    ``keys`` and ``values`` are (B, k·H, S, D). ``lengths`` (B, k) counts the tokens each place holds; it is None before
    the first write. While the guests of one call write one after another, a place either holds this call's tokens
    or still ends ``held`` states from the left.
    """

    lengths: Tensor | None = None
    held: int = 0

    def open(self, batch: int, choices: int, keys: Tensor, values: Tensor) -> None:
        """Makes room for ``choices`` guests in each of ``batch`` rows, like the keys and values that come first."""
        empty = [states.new_zeros(batch, choices * states.shape[1], 0, states.shape[3]) for states in (keys, values)]
        self.lazy_initialization(*empty)
        if not isinstance(self, StaticLayer):
            self.keys, self.values = empty
        self.values = self.values.to(values.dtype)  # under autocast not always the keys'
        self.lengths = torch.zeros(batch, choices, dtype=torch.long)

    def seen(self, rows: Tensor, columns: Tensor) -> int:
        """Tokens that these places hold."""
        assert self.lengths is not None
        return int(self.lengths[rows, columns].max())

    def write(self, rows: Tensor, columns: Tensor, past: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (R, H, new, D) states to places that hold ``past`` tokens; returns what those places now hold.

        Raises:
            LamellaError: a place holds another number of tokens than the sequence has.
        """
        assert self.lengths is not None
        if bool((self.lengths[rows, columns] != past).any()):
            raise LamellaError(
                f"The cache holds {past} tokens of the sequence, but a MoLEx guest has seen only "
                f"{int(self.lengths[rows, columns].min())} of them: part of it was filled while the adapter was off, "
                "or by a model without it. Start from an empty cache, or pass use_cache=False."
            )
        first = past == int(self.get_seq_length())
        if first:
            self.held = self.keys.shape[-2]
        part = self.part(rows, columns)
        states: tuple[Tensor, Tensor] = super(GuestLayer, part).update(keys, values)
        self.keys = self._placed(self.keys, part.keys, rows, columns, first)
        self.values = self._placed(self.values, part.values, rows, columns, first)
        self.lengths[rows, columns] = past + keys.shape[-2]
        self._count(past + keys.shape[-2])
        return states

    def part(self, rows: Tensor, columns: Tensor) -> Any:
        """A layer of the same kind that holds these places alone, (R, H, S, D), as far as they are written."""
        assert self.lengths is not None
        seen = self.seen(rows, columns)
        width = self.keys.shape[-2] if seen == int(self.get_seq_length()) else self.held
        part = copy.copy(self)
        for name in ("keys", "values"):
            states = getattr(self, name).unflatten(1, (self.lengths.shape[1], -1))
            setattr(part, name, states[rows, columns][..., :width, :])
        part._count(seen)
        return part

    def _placed(self, stored: Tensor, states: Tensor, rows: Tensor, columns: Tensor, first: bool) -> Tensor:
        """The stored states with those of some places replaced; a new tensor for the first guest of a call."""
        if first:
            stored = F.pad(stored, (0, 0, 0, states.shape[-2] - stored.shape[-2]))
        stored.unflatten(1, (-1, states.shape[1]))[rows, columns] = states
        return stored

    def _count(self, seen: int) -> None:
        """Sets the length that some kinds of layer keep beside their states."""
        if isinstance(self, StaticLayer):
            self.cumulative_length = torch.tensor(seen, device=self.device)
        elif isinstance(self, DynamicSlidingWindowLayer):
            self.cumulative_length = seen
        if isinstance(self, StaticSlidingWindowLayer):
            self.cumulative_length_int = seen

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses a block that takes the slot for its own: guests write through ``GuestSlots.view``."""
        raise LamellaError(
            "A block writes its keys and values to a slot of the cache that belongs to MoLEx's guests: this model has "
            "more cached layers than the stack that MoLEx wraps, or the cache was made for fewer blocks. Pass "
            "use_cache=False, or start from an empty cache."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end; an unwritten slot has none."""
        if self.lengths is None:
            return
        before = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        left = int(self.get_seq_length())
        self.lengths = (self.lengths - (before - left)).clamp(min=0) if left else None

    def reset(self) -> None:
        """Forgets the sequences."""
        super().reset()
        self.lengths = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the rows in the order of the beams."""
        super().reorder_cache(beam_idx)
        self._choose_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        super().batch_repeat_interleave(repeats)
        if self.lengths is not None:
            self.lengths = self.lengths.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        super().batch_select_indices(indices)
        self._choose_rows(indices)

    def _choose_rows(self, rows: Tensor) -> None:
        self.lengths = None if self.lengths is None else self.lengths[rows.cpu()]


class GuestDynamicLayer(GuestLayer, DynamicLayer):
    """Grows with the sequence."""


class GuestDynamicSlidingWindowLayer(GuestLayer, DynamicSlidingWindowLayer):
    """Grows up to the window."""


class GuestStaticLayer(GuestLayer, StaticLayer):
    """Has its full length from the start."""


class GuestStaticSlidingWindowLayer(GuestLayer, StaticSlidingWindowLayer):
    """Has the window's length from the start."""


_KINDS: dict[type, type[GuestLayer]] = {
    DynamicLayer: GuestDynamicLayer,
    DynamicSlidingWindowLayer: GuestDynamicSlidingWindowLayer,
    StaticLayer: GuestStaticLayer,
    StaticSlidingWindowLayer: GuestStaticSlidingWindowLayer,
}


def _extended(cache: Cache, num_blocks: int) -> list[Any]:
    """The layers of a cache with the guests' slots among them."""
    _refuse_other_kinds(cache)
    layers: list[Any] = cache.layers
    guests = [index for index, layer in enumerate(layers) if isinstance(layer, GuestLayer)]
    if guests:
        if len(guests) > num_blocks:
            raise LamellaError(
                f"This cache was extended for the guests of {len(guests)} blocks, and this model has {num_blocks}: it "
                "belongs to another model. Start from an empty cache."
            )
        return layers
    while cache.layer_class_to_replicate is not None and len(layers) < num_blocks:
        layers.append(cache.layer_class_to_replicate())
    own = [layer for layer in layers if not isinstance(layer, DecisionLayer)]
    if any(layer.is_initialized for layer in own[num_blocks:]):
        raise LamellaError(
            f"This cache has {len(own)} layers and the model {num_blocks} blocks: it belongs to another model. "
            "Start from an empty cache, or pass use_cache=False."
        )
    layers[min(num_blocks, len(own)) : min(num_blocks, len(own))] = [_guest_layer(layer) for layer in own[:num_blocks]]
    return layers


def can_extend(cache: Any) -> bool:
    """Whether a cache can hold guests' keys and values too."""
    return all(_obstacle(part) is None for part in _parts(cache))


def is_static(cache: Any) -> bool:
    """Whether a cache has its full length from the start, which the masks of its model fit."""
    return any(isinstance(layer, StaticLayer) for part in _parts(cache) for layer in getattr(part, "layers", ()))


def _parts(cache: Any) -> tuple[Any, ...]:
    if type(cache) is EncoderDecoderCache:
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def _refuse_other_kinds(cache: Cache) -> None:
    obstacle = _obstacle(cache)
    if obstacle is not None:
        raise LamellaError(
            f"MoLEx keeps its guests' keys and values in the model's cache, and {obstacle}. Use "
            "cache_implementation='dynamic' (or 'static'), or pass use_cache=False."
        )


def _obstacle(cache: Any) -> str | None:
    """Why a cache cannot be extended; None where it can."""
    name = type(cache).__name__
    if type(cache) not in (DynamicCache, StaticCache):
        return f"does not know how to in a {name}"
    if cache.offloading:
        return f"cannot in an offloaded {name}"
    known = {*_KINDS, *_KINDS.values(), DecisionLayer}
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in known})
    return f"does not know how to in the layers {', '.join(others)} of this {name}" if others else None


def _guest_layer(layer: Any) -> GuestLayer:
    """An empty slot of the same kind and size; each kind takes from the arguments what it knows."""
    size = layer.get_max_length()
    guest = _KINDS[type(layer)](max_cache_len=size, sliding_window=size)
    if getattr(layer, "record_past", False):
        guest.activate_past_recording()
    return guest
