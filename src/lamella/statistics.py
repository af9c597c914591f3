"""How sure a difference is: the paired bootstrap over examples and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError

_CHUNK_ENTRIES = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean difference with the percentile interval of its bootstrap distribution.

    ``p_value`` is two-sided and belongs to the interval: it is below 1 - level where the interval excludes zero. It is
    twice the share of draws on the rarer side of zero, each side counting one draw more than it had, so never 0.
    """

    difference: float
    low: float
    high: float
    level: float
    resamples: int
    p_value: float

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_interval(
    first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of mean(first − second), drawing seeds and examples with replacement, the same ones for both sides.

    Args:
        first: per-example scores (for accuracy: 0 or 1), shape (seeds, examples) or (examples,).
        second: the same examples in the same order and the same seeds, same shape.
        level: coverage of the percentile interval.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        LamellaError: the shapes differ, or there is nothing to compare.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, §13.3; two-way resampling as in Owen 2007.
    """
    a, b = np.atleast_2d(np.asarray(first, np.float64)), np.atleast_2d(np.asarray(second, np.float64))
    if a.shape != b.shape or a.size == 0:
        raise LamellaError(
            f"A paired interval needs the same seeds and examples on both sides, but the scores have shapes {a.shape} "
            f"and {b.shape} (seeds, examples). Score both methods on the same split with the same seeds."
        )
    difference = a - b
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ENTRIES // difference.shape[1])
    means = np.concatenate(
        [_resampled_means(difference, min(chunk, resamples - done), generator) for done in range(0, resamples, chunk)]
    )
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    rarer = min(int((means <= 0.0).sum()), int((means >= 0.0).sum()))
    p_value = min(1.0, 2.0 * (rarer + 1) / (resamples + 1))
    return Interval(float(difference.mean()), float(low), float(high), level, resamples, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the order given: the chance of any false alarm among them is held.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = largest
    return corrected


def _resampled_means(
    difference: npt.NDArray[np.float64], draws: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    seeds, examples = difference.shape
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=draws)  # (draws, seeds)
    example_counts = generator.multinomial(examples, np.full(examples, 1.0 / examples), size=draws)  # (draws, examples)
    by_example = seed_counts @ difference  # (draws, examples)
    means: npt.NDArray[np.float64] = (by_example * example_counts).sum(1) / (seeds * examples)
    return means
