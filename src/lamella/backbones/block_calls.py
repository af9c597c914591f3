"""How a block is called, by the names of its arguments, and how another block is called on the same."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from lamella.errors import LamellaError

# Arguments with one entry per sequence; a leading axis of 1 is shared by all.
_PER_SEQUENCE = frozenset(
    {
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "position_bias",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_decoder_position_bias",
    }
)

# Arguments that the first block of a stack is not given, since it makes them itself for all, and where it returns them.
_MADE_BY_THE_FIRST = {"position_bias": 1, "encoder_decoder_position_bias": 2}


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

        Raises:
            LamellaError: a mask that cannot be cut to some sequences.
        """
        replaced = {name: output[at] for name, at in _MADE_BY_THE_FIRST.items() if self._is_made(name, at, output)}
        if self._cache_name is not None:
            replaced[self._cache_name] = cache
        positional = self._names[: len(self.args)]
        named = {**dict(zip(positional, self.args, strict=False)), **self.kwargs, **replaced}
        if rows is not None:
            named = {name: self._cut(name, value, rows) for name, value in named.items()}
        args = tuple(named.pop(name) for name in positional)
        return args + self.args[len(positional) :], named

    def _get(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        at = self._names.index(name) if name in self._names else len(self.args)
        return self.args[at] if at < len(self.args) else None

    def _is_made(self, name: str, at: int, output: Any) -> bool:
        is_returned = isinstance(output, tuple) and len(output) > at and isinstance(output[at], Tensor)
        return name in self._names and self._get(name) is None and is_returned

    def _cut(self, name: str, value: Any, rows: Tensor) -> Any:
        if name == self._input:
            return value[rows.to(value.device)]
        if name not in _PER_SEQUENCE or value is None:
            return value
        if isinstance(value, tuple):
            return tuple(self._cut(name, part, rows) for part in value)
        if not isinstance(value, Tensor):
            raise LamellaError(
                f"{name} is a {type(value).__name__}, which cannot be cut to some sequences of a batch. Load the model "
                "with attn_implementation='sdpa' or 'eager'."
            )
        batch = self.hidden_states.shape[0]
        return value[rows.to(value.device)] if value.dim() > 1 and value.shape[0] == batch else value


def hidden_states_of(output: Any) -> Tensor:
    """What a block returned for the next one."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_hidden_states(output: Any, states: Tensor) -> Any:
    """A block's output with other hidden states in it."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


@functools.lru_cache(maxsize=256)
def parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a module's forward can be given by place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)[1:]
