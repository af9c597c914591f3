"""Bottom-k sampling written to be read: every key of every token is kept, in Python's integers. No lamella here."""

from collections.abc import Iterable

WORD = (1 << 64) - 1


def splitmix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def key(*words: int) -> int:
    """The hash of some integers, as a signed word."""
    state = 0
    for word in words:
        state = splitmix(state ^ (word & WORD))
    return state - (1 << 64) if state >> 63 else state


def smallest(
    seed: int, layer: int, expert: int, tokens: Iterable[tuple[int, int]], per_expert: int
) -> list[tuple[int, int, int]]:
    """Of an expert's tokens (document, place in it): key, document and place of those with the smallest keys."""
    return sorted((key(seed, layer, expert, row, position), row, position) for row, position in tokens)[:per_expert]
