"""The retrieval keys by name."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from lamella.errors import LamellaError

Score = Callable[[Tensor], Tensor]
MakeScore = Callable[[Tensor], Score]
Held = Literal["directions", "centroids", "texts"]


class RetrievalKey(NamedTuple):
    """A score of LoRAs for an input of one module, or for the text embedding of a sequence where it reads "texts".

    Attributes:
        name: in a config.
        reads: what the index holds of each LoRA that it reads.
        scorer: from what n LoRAs have there, ``(n, rows, in)``, to their score of inputs: ``(S, in)`` to ``(S, n)``,
            the larger the better, 0 where a LoRA has only zeros.
    """

    name: str
    reads: Held
    scorer: MakeScore


_KEYS: dict[str, RetrievalKey] = {}


def retrieval_key(name: str, reads: Held) -> Callable[[MakeScore], MakeScore]:
    """Registers the function below it as a retrieval key."""

    def register(scorer: MakeScore) -> MakeScore:
        _KEYS[name] = RetrievalKey(name, reads, scorer)
        return scorer

    return register


def retrieval_keys() -> list[str]:
    """The names of all keys."""
    return sorted(_KEYS)


def key_named(name: str) -> RetrievalKey:
    """A key by its name.

    Raises:
        LamellaError: there is none of that name.
    """
    if name not in _KEYS:
        raise LamellaError(f"retrieval={name!r} is not one of {', '.join(retrieval_keys())}.")
    return _KEYS[name]
