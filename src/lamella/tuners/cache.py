"""Decisions for whole sequences, taken at prefill, travel with transformers' cache: one layer of it holds them all.

A sequence goes on as it began, so its decisions must go wherever its keys go: reordered by beam search, repeated,
selected, copied, forgotten on reset. A cache passes all of that on to each of its layers. So the decisions lie in a
layer of their own behind the model's, of the kind that holds no keys. A call takes them out of the cache that it is
given, and leaves there those that it has taken.
"""

from collections.abc import Callable, Iterator, Mapping, MutableSet
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES

from lamella.errors import LamellaError
from lamella.routing import (
    Asked,
    CachedDecision,
    Frame,
    Generation,
    Override,
    Prompt,
    RoutedCall,
    RouterKey,
    find_readable,
)
from lamella.routing.context import stated_prompt


def recall(frame: Frame, key: RouterKey, x: Tensor, decoder: bool, prompt_tokens: int) -> CachedDecision | None:
    """What was decided for the sequences that a call continues; None where they begin in it.

    Args:
        frame: the running one.
        key: the adapter, and the name of what decides.
        x: the sequences' new tokens, ``(batch, tokens, features)``.
        decoder: whether it decides on a decoder.
        prompt_tokens: by how many first tokens it decides where nothing tells the prompt.

    Raises:
        LamellaError: the cache is of no kind that decisions can go with, or holds tokens for which nothing was decided,
            or decisions for other sequences, or ones that a forward of the whole sequences would not take.
    """
    call, (_, name) = frame.call, key
    refuse_foreign(call, name)
    if call.past == 0:
        return None
    call.is_recalled = True
    decision = call.cached.get(key)
    if decision is None:
        raise _undecided(call, key)
    if len(decision.extent) != len(x):
        raise LamellaError(
            f"The cache holds decisions for {len(decision.extent)} sequences, and {name} is given {len(x)}. "
            "Repeat or select them by the cache's own methods, or start from an empty cache."
        )
    if not call.is_settled:
        whole = frame.readable_so_far(x, decoder, prompt_tokens).extent
        if not torch.equal(whole, decision.extent.to(whole.device)):
            if bool((decision.extent < 0).any()):
                raise _undecided(call, key)
            raise LamellaError(
                f"{name} decided for the sequences in the cache by {_words(decision.extent)}, and in one forward "
                f"of all that they are now by {_words(whole, prompt_tokens)}. Give that much in the first forward, say "
                "around each of them what is to be read (lamella.prompt), or pass use_cache=False."
            )
    return decision


def _undecided(call: RoutedCall, key: RouterKey) -> LamellaError:
    adapter, name = key
    return LamellaError(
        f"The cache holds {call.past} tokens for which {name} has not decided: they were read without the adapter "
        f"{adapter!r}, with fixed weights, or as documents packed into a row. Start from an empty cache, or pass "
        "use_cache=False."
    )


def refuse_foreign(call: RoutedCall, name: str) -> None:
    """Raises where the sequences go on with something that is none of transformers' caches.

    Raises:
        LamellaError: a paged cache, a tuple of states and the like.
    """
    if call.foreign is not None:
        raise LamellaError(
            f"{name} decides for whole sequences, and what it decides travels with them in transformers' Cache; this "
            f"forward is given a {call.foreign}, which cannot take it along. Use generate without continuous batching, "
            "or pass use_cache=False."
        )


def _words(extent: Tensor, prompt_tokens: int = 0) -> str:
    """By which tokens a decision was taken, or is to be taken once all of them are there."""
    read, without = extent.T.tolist()
    counts = [max(one, prompt_tokens) if bare else one for one, bare in zip(read, without, strict=True)]
    told = ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
    tokens = "the first token" if told == "1" else f"the first {told} tokens"
    return f"{tokens}{', run without it' if any(without) else ''}"


def tokens_in(cache: Cache) -> int:
    """How many tokens of its sequences a cache holds; of states that do not count them, what was noted."""
    layers = _layers(cache)
    if any(isinstance(layer, CacheLayerMixin) for layer in layers) or not layers:
        return int(cache.get_seq_length())
    states = (layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin))
    if not any(any(layer.has_previous_state.values()) for layer in states):
        return 0
    layer = _decision_layer(cache)
    return max(1, 0 if layer is None else layer.tokens)


class DecisionLayer(DummyLayer):
    """The layer of a cache that holds the decisions for its sequences, by what took them."""

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding  # a model that asks for the first layer of a kind finds its own
        self.reset()

    def reset(self) -> None:
        """Forgets the sequences."""
        self.decisions: dict[RouterKey, CachedDecision] = {}
        self.overrides: dict[str, Override] = {}  # what held in place of routers when they were read
        self.tokens = 0  # of the sequences so far
        self.generation: int | None = None  # the generate that may go on with them as they are

    def crop(self, tokens_to_remove: int) -> None:
        """Takes tokens back; what was decided stays."""
        self.tokens = max(0, self.tokens - abs(tokens_to_remove))

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

    def asked(self, generation: Generation, asked: Asked, arguments: dict[str, Any]) -> dict[str, Any]:
        """Sees to it that a ``generate`` begins where its decisions are those of one forward of all it is given.

        A cache whose decisions were taken by another prompt (that of an earlier turn of a conversation, or of what
        several prompts have in common) or that has none is emptied, so that ``generate`` reads all again.

        Raises:
            LamellaError: it is to be read again, and the ids in it are not given.
        """
        cache = next((value for value in arguments.values() if isinstance(value, Cache)), None)
        layer = None if cache is None else _decision_layer(cache)
        was_decided, decides = layer is not None and bool(layer.decisions), _with_sequences(asked.model) is not None
        if cache is not None and tokens_in(cache) > 0 and (was_decided or decides):
            # An assistant is asked again and again, and the prompt is that of the first time.
            goes_on = was_decided and bool(asked.setting("is_assistant"))
            if not decides or not (goes_on or (layer is not None and _fits(layer, asked))):
                _read_again(cache, asked)
            if layer is not None:
                layer.generation = generation.number
        return _in_one_piece(asked, arguments)

    def batched(self, model: nn.Module) -> None:
        """Refuses continuous batching where something has to go with each sequence.

        Raises:
            LamellaError: it has.
        """
        layer = _with_sequences(model)
        if layer is not None:
            raise LamellaError(
                f"{layer.name} has something to go with each sequence (a decision for all of it, or keys of its own), "
                "and the paged cache of continuous batching (generate_batch, transformers serve) cannot take it along. "
                "Use generate, or export plain LoRAs for a server (lamella.export_experts, lamella.collapse)."
            )

    def opened(self, call: RoutedCall, arguments: Mapping[str, Any]) -> None:
        """Notes what the cache brings: the decisions, and how many tokens have been read."""
        cache = next((value for value in arguments.values() if isinstance(value, Cache)), None)
        if cache is None:
            call.foreign = _foreign(arguments)
            return
        layer = _decision_layer(cache)
        call.cache, call.past = cache, tokens_in(cache)
        if layer is not None:
            if call.past > 0 and not _are_equal(layer.overrides, call.overrides):
                raise LamellaError(
                    f"The cache holds {call.past} tokens that were read with other fixed weights or masked experts "
                    "than hold now. Say them around each forward of the sequences, start from an empty cache, or pass "
                    "use_cache=False."
                )
            call.cached = dict(layer.decisions)
            call.is_settled = call.generation is not None and layer.generation == call.generation.number

    def closed(self, call: RoutedCall, output: Any) -> None:
        """Gives the cache the decisions; now it has all of the model's own layers."""
        cache, call.cache = call.cache or _cache_of(output), None
        if not call.cached and not call.overrides:
            return
        if call.past > 0 and not call.is_recalled and not call.overrides:
            adapter, name = next(iter(call.cached))
            raise LamellaError(
                f"The cache holds {call.past} tokens that were read with the decisions of {name} in the adapter "
                f"{adapter!r}, which does not run now. Start from an empty cache, or pass use_cache=False."
            )
        if cache is None:
            if call.cached and call.generation is not None and isinstance(output, Mapping):
                call.foreign = _foreign(output)
                refuse_foreign(call, next(iter(call.cached))[1])
            return
        layer = _decision_layer(cache)
        if layer is None:
            layer = DecisionLayer(all(cache.is_sliding))
            _layers(cache).append(layer)
        if call.past == 0:
            layer.generation = None if call.generation is None else call.generation.number
        layer.decisions, layer.overrides, layer.tokens = call.cached, call.overrides, call.past + call.tokens


class SequenceModule(Protocol):
    """A layer with something that has to go with each sequence: a decision for all of it, or keys of its own."""

    name: str

    @property
    def goes_with_sequences(self) -> bool:
        """Whether the active adapter has."""


def _with_sequences(model: nn.Module) -> SequenceModule | None:
    """The first layer that has something to go with each sequence."""
    layers: Iterator[Any] = (module for module in model.modules() if hasattr(type(module), "goes_with_sequences"))
    return next((layer for layer in layers if layer.goes_with_sequences), None)


def _are_equal(some: Mapping[str, Override], others: Mapping[str, Override]) -> bool:
    return some.keys() == others.keys() and all(override.equals(others[name]) for name, override in some.items())


def _fits(layer: DecisionLayer, asked: Asked) -> bool:
    """Whether decisions are those that one forward of all that ``generate`` is given would take."""
    overrides = asked.tracker.overrides_here()
    is_decided = bool(layer.decisions) or any(override.fixed is not None for override in overrides.values())
    if asked.given is None or not is_decided or not _are_equal(layer.overrides, overrides):
        return False
    real = asked.real
    known = stated_prompt() or Prompt()
    for decision in layer.decisions.values():
        if len(decision.extent) % len(real):
            return False
        rows = real.repeat_interleave(len(decision.extent) // len(real), dim=0)
        whole = find_readable(rows, known, None, decision.prompt_tokens).extent
        if not torch.equal(whole, decision.extent.to(whole.device)):
            return False
    return True


def _read_again(cache: Cache, asked: Asked) -> None:
    """Empties a cache whose sequences ``generate`` is to read anew."""
    given = asked.given
    if given is None or asked.real.shape[1] != given.shape[1]:
        raise LamellaError(
            f"The cache holds {tokens_in(cache)} tokens that were read with other decisions than one forward of all "
            "would take (by another prompt, other fixed weights, another adapter or none), and generate is given only "
            "what comes after them. Give it all ids, or state by lamella.prompt, around this generate and around what "
            "filled the cache, what decisions are to read."
        )
    asked.tracker.say_once(
        "cache read again",
        "A cache that generate was given is emptied and its sequences are read again: they were read with other "
        "decisions than one forward of all would take (by the prompt of an earlier turn or of a shared beginning, "
        "other fixed weights, another adapter or none). To go on with a cache as it is, state by lamella.prompt, "
        "around each generate, what decisions are to read.",
    )
    cache.reset()


def _in_one_piece(asked: Asked, arguments: dict[str, Any]) -> dict[str, Any]:
    """Has the prompt read in one forward, unless what decisions are to read lies in the first of several."""
    size, given = asked.setting("prefill_chunk_size"), asked.given
    if size is None or given is None or _with_sequences(asked.model) is None:
        return arguments
    known, real = stated_prompt(), asked.real
    if known is not None:
        first, whole = (find_readable(part, known, None, size + 1).extent for part in (real[:, :size], real))
        if torch.equal(first, whole):
            return arguments
    asked.tracker.say_once(
        "in one piece",
        "prefill_chunk_size is left out: a decision for a whole sequence reads its prompt in one forward.",
    )
    return {**arguments, "prefill_chunk_size": None}


def _foreign(values: Mapping[str, Any]) -> str | None:
    """What sequences go on with that is none of transformers' caches, by its type; None where there is none."""
    for name, value in values.items():
        is_state = name in ALL_CACHE_NAMES and value is not None
        is_like_a_cache = hasattr(value, "update") and not isinstance(value, Mapping | MutableSet)
        if not isinstance(value, Cache) and (is_state or is_like_a_cache):
            return type(value).__name__
    return None


def _decision_layer(cache: Cache) -> DecisionLayer | None:
    return next((layer for layer in _layers(cache) if isinstance(layer, DecisionLayer)), None)


def _layers(cache: Cache) -> list[Any]:
    layers: list[Any] = cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers
    return layers


def _cache_of(output: Any) -> Cache | None:
    """The cache that a model has made by itself."""
    values = output if isinstance(output, tuple) else output.values() if isinstance(output, Mapping) else ()
    return next((value for value in values if isinstance(value, Cache)), None)
