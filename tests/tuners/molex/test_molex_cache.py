"""The guests' slots in transformers' caches, held against a slow reference: one separate cache per row and guest."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    StaticCache,
)
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from lamella.backbones import BlockCall
from lamella.errors import LamellaError
from lamella.tuners.molex.cache import GuestSlots, guest_slots
from lamella.tuners.molex.guests import run_guest

BLOCKS, HEADS, DIM, WINDOW, LONGEST = 3, 2, 4, 5, 24


def _full() -> PreTrainedConfig:
    return LlamaConfig(num_hidden_layers=BLOCKS)


def _sliding() -> PreTrainedConfig:
    return MistralConfig(num_hidden_layers=BLOCKS, sliding_window=WINDOW)


def _hybrid() -> PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Qwen3Config(num_hidden_layers=BLOCKS, use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds)


CACHES: dict[str, Callable[[], Cache]] = {
    "lazy": DynamicCache,
    "dynamic": lambda: DynamicCache(config=_full()),
    "dynamic-sliding": lambda: DynamicCache(config=_sliding()),
    "dynamic-hybrid": lambda: DynamicCache(config=_hybrid()),
    "static": lambda: StaticCache(config=_full(), max_cache_len=LONGEST),
    "static-sliding": lambda: StaticCache(config=_sliding(), max_cache_len=LONGEST),
    "static-hybrid": lambda: StaticCache(config=_hybrid(), max_cache_len=LONGEST),
}
STATIC = {name for name in CACHES if name.startswith("static")}


def _alone(layer: Any) -> Any:
    """An empty plain layer of the kind of a block's own."""
    if isinstance(layer, StaticSlidingWindowLayer):
        return StaticSlidingWindowLayer(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len)
    if isinstance(layer, StaticLayer):
        return StaticLayer(max_cache_len=layer.max_cache_len)
    if isinstance(layer, DynamicSlidingWindowLayer):
        return DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    return DynamicLayer()


def _states(rows: int, new: int, generator: torch.Generator, heads: int = HEADS) -> tuple[Tensor, Tensor]:
    keys = torch.randn(rows, heads, new, DIM, generator=generator)
    return keys, torch.randn(rows, heads, new, DIM + 1, generator=generator)


class Play:
    """One cache under test, and beside it a list of rows that each keep a plain layer per depth and guest."""

    def __init__(self, cache: Cache, choices: dict[int, Tensor], seed: int = 0, own_first: bool = True) -> None:
        self.cache, self.own_first = cache, own_first
        self.generator = torch.Generator().manual_seed(seed)
        guest_slots(cache, BLOCKS)
        self.choices = choices
        batch = len(choices[0])
        self.rows = [
            {
                (depth, int(guest)): _alone(cache.layers[depth])
                for depth, indices in choices.items()
                for guest in indices[row]
            }
            for row in range(batch)
        ]
        self.tokens = 0

    def step(self, new: int) -> None:
        """One call of the model: every block and every chosen guest writes; the guest sees what its rows would."""
        slots = guest_slots(self.cache, BLOCKS)
        for depth in range(BLOCKS):
            if self.tokens == 0:
                slots.begin(depth)
            if self.own_first:
                self._own(depth, new)
            for guest in range(BLOCKS):
                if guest != depth:
                    self._guest(slots, depth, guest, new)
            if not self.own_first:
                self._own(depth, new)
        self.tokens += new
        assert int(self.cache.get_seq_length()) == self.tokens

    def _own(self, depth: int, new: int) -> int:
        return self.cache.update(*_states(len(self.rows), new, self.generator), depth)[0].shape[-2]

    def _guest(self, slots: GuestSlots, depth: int, guest: int, new: int) -> None:
        rows = [row for row, layers in enumerate(self.rows) if (depth, guest) in layers]
        if not rows:
            return
        view = slots.view(depth, guest, torch.tensor(rows), len(self.rows), self.tokens)
        assert view.get_seq_length(guest) == self.tokens
        sizes = view.get_mask_sizes(new, guest)
        keys, values = _states(len(rows), new, self.generator)
        seen_keys, seen_values = view.update(keys, values, guest)
        for at, row in enumerate(rows):
            alone = self.rows[row][depth, guest]
            assert sizes == alone.get_mask_sizes(new)
            expected = alone.update(keys[at : at + 1], values[at : at + 1])
            torch.testing.assert_close((seen_keys[at : at + 1], seen_values[at : at + 1]), expected, rtol=0, atol=0)

    def rearrange(self, rows: list[int]) -> None:
        """What a batch operation does to rows that live apart."""
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]
        self.choices = {depth: indices[rows] for depth, indices in self.choices.items()}


def _choices(batch: int, choices: int, seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(BLOCKS, batch, BLOCKS, generator=generator).argsort(dim=-1)
    return {depth: order[depth, :, :choices] for depth in range(BLOCKS)}


@pytest.mark.parametrize("name", CACHES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_each_row_sees_what_a_cache_of_its_own_would_hold(name: str, data: st.DataObject) -> None:
    batch, choices, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 99))
    play = Play(CACHES[name](), _choices(batch, choices, seed), seed, own_first=data.draw(st.booleans()))
    play.step(data.draw(st.integers(1, 8), label="prompt"))
    operations = ["step", "step", "reorder", "deepcopy"]
    if name not in STATIC:
        operations += ["repeat", "select"]
    for _ in range(data.draw(st.integers(0, 6), label="operations")):
        operation = data.draw(st.sampled_from(operations))
        size = len(play.rows)
        if operation == "step":
            play.step(min(data.draw(st.integers(1, 3)), max(1, LONGEST - play.tokens)))
        elif operation == "deepcopy":
            play.cache = copy.deepcopy(play.cache)
        elif operation == "reorder":
            rows = data.draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
            play.cache.reorder_cache(torch.tensor(rows))
            play.rearrange(rows)
        elif operation == "repeat" and size <= 4:
            play.cache.batch_repeat_interleave(2)
            play.rearrange([row for row in range(size) for _ in range(2)])
        elif operation == "select":
            rows = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
            play.cache.batch_select_indices(torch.tensor(rows))
            play.rearrange(rows)
    play.step(1)


@pytest.mark.parametrize("name", ["lazy", "dynamic", "dynamic-sliding", "dynamic-hybrid"])
def test_cropped_tokens_are_gone_from_the_slots(name: str) -> None:
    play = Play(CACHES[name](), _choices(4, 2, seed=3))
    play.cache.activate_past_recording()
    for layers in play.rows:
        for alone in layers.values():
            if hasattr(alone, "activate_past_recording"):
                alone.activate_past_recording()
    for new, removed in ((4, 1), (6, 3), (1, 0), (3, 2), (2, 1)):
        play.step(new)
        play.cache.crop(-removed)
        for layers in play.rows:
            for alone in layers.values():
                if alone.is_initialized:
                    alone.crop(-removed)
        play.tokens -= removed
    play.step(1)


def test_what_a_guest_gets_while_a_window_records_its_past_records_too() -> None:
    cache = CACHES["dynamic-sliding"]()
    cache.activate_past_recording()
    assert guest_slots(cache, BLOCKS).view(0, 1, None, 1).is_recording_past(0)
    later = CACHES["dynamic-sliding"]()
    view = guest_slots(later, BLOCKS).view(0, 1, None, 1)
    later.activate_past_recording()
    assert view.is_recording_past(0)
    assert guest_slots(later, BLOCKS).view(0, 2, None, 1).is_recording_past(0)


@pytest.mark.parametrize("name", CACHES)
def test_a_guest_starts_empty_beside_what_a_training_forward_has_written(name: str) -> None:
    """So it is where the first block has no guest, and transformers keeps a cache in training."""
    cache = CACHES[name]()
    keys, values = _states(2, 3, torch.Generator().manual_seed(0))
    written = [kept.clone() for kept in cache.update(keys.requires_grad_(), values, 0)]
    view = guest_slots(cache, BLOCKS).view(0, 1, None, 2)
    assert view.get_seq_length(0) == 0
    torch.testing.assert_close([cache.layers[0].keys, cache.layers[0].values], written, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lazy", "dynamic-sliding"])
def test_cropping_everything_leaves_an_empty_slot(name: str) -> None:
    play = Play(CACHES[name](), _choices(3, 1, seed=1))
    play.step(3)
    play.cache.crop(-3)
    for layers in play.rows:
        for place, alone in layers.items():
            layers[place] = _alone(alone)
    play.tokens = 0
    play.step(2)


@pytest.mark.parametrize("name", CACHES)
def test_reset_forgets_states(name: str) -> None:
    play = Play(CACHES[name](), _choices(3, 2, seed=5))
    play.step(4)
    play.cache.reset()
    other = Play(play.cache, _choices(2 if name not in STATIC else 3, 1, seed=6))
    for _ in range(4):
        other.step(2)


@pytest.mark.parametrize("name", CACHES)
def test_room_is_made_once_and_is_of_the_blocks_kinds(name: str) -> None:
    cache = CACHES[name]()
    for _ in range(2):
        slots = guest_slots(cache, BLOCKS)
        assert len(cache.layers) == BLOCKS + 1
    for depth, own in enumerate(cache.layers[:BLOCKS]):
        kept = slots.view(depth, 0, None, 1).layers[2]
        assert type(kept) is type(own)
        assert kept.get_max_length() == own.get_max_length()
        assert kept.get_seq_length() == 0


@pytest.mark.parametrize("name", CACHES)
def test_the_cache_looks_the_same_from_outside(name: str) -> None:
    plain, play = CACHES[name](), Play(CACHES[name](), _choices(3, 1, seed=2))
    for new in (4, 1, 3):
        for depth in range(BLOCKS):
            plain.update(*_states(3, new, play.generator), depth)
        play.step(new)
        for outside in (
            Cache.get_seq_length,
            Cache.get_max_length,
            lambda cache: [cache.get_mask_sizes(2, depth) for depth in range(BLOCKS)],
            lambda cache: cache.is_compileable,
            lambda cache: cache.is_croppable,
            lambda cache: cache.is_sliding[:BLOCKS],
            lambda cache: True in cache.is_sliding and cache.is_sliding.index(True),
            lambda cache: False in cache.is_sliding and cache.is_sliding.index(False),
            lambda cache: any(cache.is_linear),
        ):
            assert outside(play.cache) == outside(plain)
    if name in STATIC:
        assert play.cache.batch_size == plain.batch_size


@pytest.mark.parametrize("name", CACHES)
def test_a_depth_without_guests_bears_every_operation(name: str) -> None:
    itself = {depth: torch.full((2, 1), depth) for depth in range(BLOCKS)}
    play = Play(CACHES[name](), itself)
    play.step(2)
    play.cache.reorder_cache(torch.tensor([1, 0]))
    play.rearrange([1, 0])
    if name not in STATIC:
        play.cache.crop(-1)
        play.cache.batch_repeat_interleave(2)
        play.rearrange([0, 0, 1, 1])
        play.tokens -= 1
    play.step(1)
    play.cache.reset()


def test_rows_may_be_left_out_to_mean_all() -> None:
    cache = DynamicCache()
    slots, generator = guest_slots(cache, BLOCKS), torch.Generator().manual_seed(0)
    written = _states(3, 2, generator)
    keys, values = slots.view(0, 2, None, 3, 0).update(*written, 2)
    assert torch.equal(keys, written[0])
    assert torch.equal(values, written[1])
    assert slots.view(0, 2, None, 3, 2).get_seq_length() == 2


@pytest.mark.parametrize("name", ["lazy", "dynamic-sliding", "static"])
def test_gradients_pass_through_the_returned_states(name: str) -> None:
    cache = CACHES[name]()
    slots, generator = guest_slots(cache, BLOCKS), torch.Generator().manual_seed(0)
    written = {}
    for guest, rows in ((1, [0, 2]), (2, [1])):
        keys, values = (states.requires_grad_() for states in _states(len(rows), 3, generator))
        seen = slots.view(0, guest, torch.tensor(rows), 3).update(keys, values, guest)
        written[guest] = keys, values, seen
    torch.stack([(seen[0] * guest).sum() + seen[1].sum() for guest, (*_, seen) in written.items()]).sum().backward()
    for guest, (keys, values, _) in written.items():
        assert torch.equal(keys.grad, torch.full_like(keys, guest))
        assert torch.equal(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("name", CACHES)
def test_values_may_be_of_another_precision_than_keys(name: str) -> None:
    cache = CACHES[name]()
    slots, generator = guest_slots(cache, BLOCKS), torch.Generator().manual_seed(0)
    cache.update(*_states(3, 2, generator), 0)
    keys, values = _states(2, 2, generator)
    seen_keys, seen_values = slots.view(0, 1, torch.tensor([0, 2]), 3).update(keys, values.bfloat16(), 1)
    assert torch.equal(seen_keys[:, :, :2], keys)
    assert torch.equal(seen_values[:, :, :2], values.bfloat16().float())


def _encoder_decoder(static: bool = False) -> EncoderDecoderCache:
    if static:
        parts = [StaticCache(config=_full(), max_cache_len=length) for length in (LONGEST, 7)]
        return EncoderDecoderCache(*parts)
    return EncoderDecoderCache(DynamicCache(config=_full()), DynamicCache(config=_full()))


def _attend(cache: Any, layer: int, own: tuple[Tensor, Tensor], encoded: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What the attention layers of an encoder-decoder model do with the cache they are given."""
    assert isinstance(cache, EncoderDecoderCache)
    seen = list(cache.self_attention_cache.update(*own, layer))
    if cache.is_updated.get(layer):
        held = cache.cross_attention_cache.layers[layer]
        return [*seen, held.keys, held.values]
    seen += cache.cross_attention_cache.update(*encoded, layer)
    cache.is_updated[layer] = True
    return seen


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("choices", [1, 2])
def test_an_encoder_decoder_guest_has_cross_attention_keys_of_its_own(static: bool, choices: int) -> None:
    cache, generator = _encoder_decoder(static), torch.Generator().manual_seed(0)
    slots, batch = guest_slots(cache, BLOCKS), 4
    chosen = _choices(batch, choices, seed=1)
    rows_alone: dict[tuple[int, int, int], EncoderDecoderCache] = {}
    for step in range(4):
        new = 3 if step == 0 else 1
        for depth in range(BLOCKS):
            _attend(cache, depth, _states(batch, new, generator), _states(batch, 7, generator))
            for guest in set(chosen[depth].flatten().tolist()) - {depth}:
                rows = (chosen[depth] == guest).any(dim=1).nonzero().flatten()
                own, encoded = _states(len(rows), new, generator), _states(len(rows), 7, generator)
                seen = _attend(slots.view(depth, guest, rows, batch), guest, own, encoded)
                for at, row in enumerate(rows.tolist()):
                    alone = rows_alone.setdefault((depth, row, guest), _encoder_decoder(static))
                    one = slice(at, at + 1)
                    expected = _attend(alone, guest, *(tuple(s[one] for s in states) for states in (own, encoded)))
                    torch.testing.assert_close([states[one] for states in seen], expected, rtol=0, atol=0)
        order = torch.randperm(batch, generator=generator)
        cache.reorder_cache(order)
        chosen = {depth: indices[order] for depth, indices in chosen.items()}
        rows_alone = {
            (depth, new_row, guest): copy.deepcopy(alone)
            for (depth, row, guest), alone in rows_alone.items()
            for new_row in (order == row).nonzero().flatten().tolist()
        }
    cache.reset()
    assert not slots.view(0, 1, torch.tensor([0]), batch).is_updated.get(1)


def test_a_cache_made_for_a_deeper_encoder_keeps_its_spare_layers_behind() -> None:
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=BLOCKS + 2))
    play = Play(cache, _choices(3, 1, seed=0))
    play.step(2)
    assert len(cache.layers) == BLOCKS + 3
    assert not any(layer.is_initialized for layer in cache.layers[BLOCKS:-1])


class _OtherCache(DynamicCache):
    pass


def _offloaded() -> Cache:
    cache = DynamicCache(config=_full())
    cache.offloading = True
    return cache


@pytest.mark.parametrize(
    ("cache", "named"),
    [
        (_OtherCache, "_OtherCache"),
        (_offloaded, "offloaded DynamicCache"),
        (lambda: EncoderDecoderCache(DynamicCache(), _OtherCache()), "_OtherCache"),
    ],
)
def test_a_cache_that_cannot_be_extended_is_refused_by_name(cache: Callable[[], Cache], named: str) -> None:
    with pytest.raises(LamellaError, match=rf"{named}.*use_cache=False"):
        guest_slots(cache(), BLOCKS)


def test_a_cache_of_another_model_is_refused() -> None:
    with pytest.raises(LamellaError, match="made for 3 blocks, and block 3 runs"):
        guest_slots(DynamicCache(config=_full()), 4).view(3, 1, None, 1)
    cache = DynamicCache(config=_full())
    guest_slots(cache, BLOCKS)
    with pytest.raises(LamellaError, match="made for fewer blocks"):
        cache.update(*_states(2, 1, torch.Generator()), BLOCKS)


def test_a_cache_for_the_first_blocks_has_room_for_their_guests() -> None:
    """Of a model that exits early; a block after them can still be a guest."""
    cache, generator = DynamicCache(config=LlamaConfig(num_hidden_layers=1)), torch.Generator().manual_seed(0)
    for past in (0, 3):
        keys, _ = guest_slots(cache, BLOCKS).view(0, 2, None, 1, past).update(*_states(1, 3, generator), 2)
        assert keys.shape[-2] == past + 3


def test_tokens_that_no_guest_saw_are_noticed() -> None:
    slots, generator = guest_slots(DynamicCache(config=_full()), BLOCKS), torch.Generator().manual_seed(0)
    for seen in (0, 2):
        with pytest.raises(LamellaError, match=rf"holds 3 tokens .* seen only {seen}"):
            slots.view(0, 2, torch.tensor([1]), 2, 3)
        slots.view(0, 2, torch.tensor([1]), 2, 0).update(*_states(1, 2, generator), 2) if seen == 0 else None


def test_a_guest_that_was_not_chosen_has_seen_nothing() -> None:
    slots, generator = guest_slots(DynamicCache(), BLOCKS), torch.Generator().manual_seed(0)
    slots.view(0, 2, torch.tensor([1]), 2, 0).update(*_states(1, 2, generator), 2)
    with pytest.raises(LamellaError, match="Block 2 runs as a guest at block 0"):
        slots.view(0, 2, None, 2, 2)


def test_layers_of_a_cache_that_was_used_lend_no_rows_to_the_guests() -> None:
    cache, generator = StaticCache(config=_full(), max_cache_len=LONGEST), torch.Generator().manual_seed(0)
    for depth in range(BLOCKS):
        cache.update(*_states(4, 3, generator), depth)
    cache.reset()
    written = _states(1, 2, generator)
    keys, _ = guest_slots(cache, BLOCKS).view(0, 2, torch.tensor([3]), 4, 0).update(*written, 2)
    assert torch.equal(keys[:, :, :2], written[0])


def test_guests_of_a_recurrent_block_keep_states_of_their_own() -> None:
    """Each row's states are those that it alone would have, wherever the rows go."""
    cache, generator = DynamicCache(config=_full()), torch.Generator().manual_seed(0)
    cache.layers[1] = LinearAttentionLayer()
    groups = {0: [0, 2], 2: [1]}
    alone = {row: LinearAttentionLayer() for rows in groups.values() for row in rows}
    for step in range(4):
        slots = guest_slots(cache, BLOCKS)
        for guest, rows in groups.items():
            view = slots.view(1, guest, torch.tensor(rows), 3, step)
            assert (view.get_conv_state(guest) is None) == (step == 0)
            conv, recurrent = torch.randn(len(rows), 5, 3, generator=generator), torch.randn(len(rows), 2, 4)
            seen = view.update_conv_state(conv, guest), view.update_recurrent_state(recurrent, guest)
            for at, row in enumerate(rows):
                expected = alone[row].update_conv_state(conv[at : at + 1]), recurrent[at : at + 1]
                for one, other in zip(seen, expected, strict=True):
                    assert torch.equal(one[at : at + 1], other)
        if step == 1:
            cache.reorder_cache(torch.tensor([1, 1, 0]))
            groups = {0: [2], 2: [0, 1]}
            alone = {0: copy.deepcopy(alone[1]), 1: copy.deepcopy(alone[1]), 2: alone[0]}


class KeepsWhatItSaidLast(torch.nn.Module):
    """A block that keeps something of a prompt, and something else of single tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.last = None, None

    def forward(self, x):
        if x.shape[1] == 1:
            self.last = x + (0 if self.last is None else self.last)
            return self.last
        self.prompt = x
        return x


def test_what_a_block_keeps_in_itself_of_single_tokens_alone_is_kept_apart_too():
    block, kept = KeepsWhatItSaidLast(), {}
    prompt, token = torch.ones(1, 3, 2), torch.ones(1, 1, 2)

    def as_guest(x):
        call = BlockCall(block, (x,), {})
        return run_guest(block, call, None, None, kept, x, None, False)

    as_guest(prompt)
    assert [as_guest(token).mean().item() for _ in range(3)] == [1.0, 2.0, 3.0]
    assert block.prompt is None
    assert block(token).mean() == 1.0  # as a host it has said nothing yet
