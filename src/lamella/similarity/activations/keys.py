"""Pseudo-random numbers that belong to a thing rather than to a moment: the same in any order and on any device."""

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """A 64-bit word as torch writes it, which has no unsigned ones."""
    return word - (1 << 64) if word >> 63 else word


_STEP, _FIRST, _SECOND = (_signed(w) for w in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hashed(*words: Tensor | int) -> Tensor:
    """A 64-bit hash of several integers, int64, over the whole range; the shapes broadcast.

    Chained SplitMix64 (Steele, Lea and Flood, 2014): each word is mixed into the hash of those before it, so that for
    equal words before it no two last words have the same hash.
    """
    state = torch.zeros((), dtype=torch.int64)
    for word in words:
        state = _mixed(state ^ word)
    return state


def unit(words: Tensor) -> Tensor:
    """64-bit hashes as numbers in [0, 1), float64."""
    return _shifted(words, 11).double() / (1 << 53)


def _mixed(words: Tensor) -> Tensor:
    words = words + _STEP
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left; torch's own shift repeats the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
