"""How a block is called, by the names of its arguments, and how another block is called on the same."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lamella.compiling import known_when_traced
from lamella.errors import LamellaError

# Arguments with one entry per sequence in the first of so many axes; there a leading axis of 1 is shared by all.
_PER_SEQUENCE = {
    "attention_mask": (2, 4),
    "position_ids": (2,),
    "position_embeddings": (3,),
    "position_bias": (4,),
    "encoder_hidden_states": (3,),
    "encoder_attention_mask": (2, 4),
    "encoder_decoder_position_bias": (4,),
}

# Arguments that the first block of a stack is not given, since it makes them itself for all and returns them: that of
# its own attention first, that of cross-attention first in the second half.
_MADE_BY_THE_FIRST = ("position_bias", "encoder_decoder_position_bias")


class BlockCall:
    """The arguments of one call of a block, by name.

    Attributes:
        hidden_states: what the block maps, ``(batch, tokens, features)``.
        cache: the keys and values of the sequences so far; None where there are none.
    """

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._names = parameter_names(type(block).forward)
        self._input = self._names[0]
        self.hidden_states: Tensor = args[0] if args else kwargs[self._input]
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._cache_name = next((name for name, value in given.items() if isinstance(value, Cache)), None)
        self.cache: Cache | None = None if self._cache_name is None else given[self._cache_name]

    def on(self, rows: Tensor | None, cache: Any, output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for another block on the same input.

        Args:
            rows: the sequences it runs on; None for all.
            cache: its keys and values in place of this block's.
            output: what this block returned, with what a stack's first block makes for all others.
        """
        named = self._given(output)
        if self._cache_name is not None:
            named[self._cache_name] = cache
        if rows is not None:
            named = {name: self._cut(name, value, rows) for name, value in named.items()}
        positional = self._names[: len(self.args)]
        args = tuple(named.pop(name) for name in positional)
        return args + self.args[len(positional) :], named

    def can_cut(self, output: Any) -> bool:
        """Whether every argument is known to have an entry per sequence, or to have none.

        Of another one the size of an axis may or may not be the number of sequences (or, as in an alibi for each head,
        a multiple of it); then a block runs on all sequences.
        """
        given = {**self._given(output), "more": self.args[len(self._names) :]}
        return all(name in (self._input, self._cache_name) or self._is_known(name, x) for name, x in given.items())

    def check_states(self, block: str) -> None:
        """Raises unless the block's input has an axis for sequences, one for tokens and one for features.

        Args:
            block: its dotted name.

        Raises:
            LamellaError: another shape, or a state that blocks hand on to themselves beside the cache.
        """
        if self.hidden_states.dim() != 3:
            raise LamellaError(states_without_sequences(block, self.hidden_states.shape))
        state = self._get("state")
        if state is not None:
            raise LamellaError(
                f"{block} is given a state that each block keeps for itself, and a guest would write into another "
                "block's. Pass use_cache=False."
            )

    def _given(self, output: Any) -> dict[str, Any]:
        """All arguments that have names, with what the first block makes for the others."""
        rest = len(output) - 1 if isinstance(output, tuple) else 0
        places = dict(zip(_MADE_BY_THE_FIRST, (1, 1 + rest // 2), strict=True)) if rest else {}
        made = {name: output[at] for name, at in places.items() if self._is_made(name, output[at])}
        return {**dict(zip(self._names, self.args, strict=False)), **self.kwargs, **made}

    def _get(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        at = self._names.index(name) if name in self._names else len(self.args)
        return self.args[at] if at < len(self.args) else None

    def _is_made(self, name: str, value: Any) -> bool:
        is_missing = name in self._names and self._get(name) is None and isinstance(value, Tensor)
        return is_missing and (name == "position_bias" or self._get("encoder_hidden_states") is not None)

    def _is_known(self, name: str, value: Any) -> bool:
        if isinstance(value, Mapping | list | tuple):
            return all(self._is_known(name, part) for part in (value.values() if isinstance(value, Mapping) else value))
        if not isinstance(value, Tensor):
            return value is None or isinstance(value, str | int | float | torch.dtype | torch.device)
        batch = len(self.hidden_states)
        if value.dim() in _PER_SEQUENCE.get(name, ()):
            return value.shape[0] in (1, batch)
        return all(size % batch for size in value.shape)

    def _cut(self, name: str, value: Any, rows: Tensor) -> Any:
        if name == self._input:
            return value[rows.to(value.device)]
        if name in _PER_SEQUENCE and isinstance(value, tuple):
            return tuple(self._cut(name, part, rows) for part in value)
        if isinstance(value, Tensor) and value.dim() in _PER_SEQUENCE.get(name, ()) and len(value) > 1:
            return value[rows.to(value.device)]
        return value


def states_without_sequences(block: str, shape: Sequence[int]) -> str:
    """An error's text: what a block maps is not laid out by sequences."""
    return (
        f"{block} maps states of shape {tuple(shape)}, not (batch, tokens, features), so that there are no sequences "
        "for which MoLEx could choose a block. Use MoLA, or a form of MOLE that mixes LoRAs and no blocks."
    )


def hidden_states_of(output: Any) -> Tensor:
    """What a block returned for the next one."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


def with_hidden_states(output: Any, states: Tensor) -> Any:
    """A block's output with other hidden states in it."""
    if not isinstance(output, tuple | list):
        return states
    return type(output)((states, *output[1:]))


@known_when_traced
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a module's forward can be given by place."""
    return _read_parameter_names(forward)


@functools.lru_cache(maxsize=256)
def _read_parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)[1:]
