"""How sure a difference between methods is: the paired bootstrap over examples and seeds, one for library and lab."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError

RESAMPLES = 10_000
SIGNIFICANT = 0.05
ENDS = (0.025, 0.975)  # quantiles of a 95 % interval
_CHUNK_ENTRIES = 2_000_000

Floats = npt.NDArray[np.float64]
# per-example scores of one method by seed, each (examples,)
BySeed = Mapping[int, npt.ArrayLike]


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


@dataclass(frozen=True)
class Contrast:
    """``first`` minus ``second`` on the seeds that both have; ``p_value`` is Holm's, over the contrasts made together.

    ``seeds`` and ``examples`` count what is resampled; one example where the metric is not a mean over them.
    """

    first: str
    second: str
    interval: Interval
    p_value: float
    seeds: int
    examples: int

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at 0.05."""
        return self.p_value < SIGNIFICANT


def contrast(
    scores: Mapping[str, BySeed], pairs: Sequence[tuple[str, str]], strata: Sequence[int] = ()
) -> list[Contrast]:
    """Paired differences between methods of one table, from the same draws of seeds and examples for all of them.

    Args:
        scores: per-example scores by method and seed; the same examples in the same order everywhere.
        pairs: which differences, first minus second; left out are pairs that share no seed, and those with a single
            number on each side, of which nothing can be resampled.
        strata: how many examples each of several tasks has, one task's after the other's: their means count alike, and
            examples are drawn within tasks. One task where empty.

    Raises:
        LamellaError: methods have different numbers of examples, or none, or not so many as the tasks.

    Source: as `paired_interval`; Holm's correction as `holm`.
    """
    by_seeds: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for first, second in pairs:
        if shared := tuple(sorted(set(scores.get(first, {})) & set(scores.get(second, {})))):
            by_seeds.setdefault(shared, []).append((first, second))
    contrasts: dict[tuple[str, str], Contrast] = {}
    for seeds, alike in by_seeds.items():
        names = list(dict.fromkeys(name for pair in alike for name in pair))
        values = _stacked([[scores[name][seed] for seed in seeds] for name in names], strata)
        if values[0].size == 1:
            continue
        drawn = resampled_means(values, strata=strata)  # (methods, draws)
        for first, second in alike:
            a, b = names.index(first), names.index(second)
            interval = _interval(float((values[a] - values[b]).mean()), drawn[a] - drawn[b])
            contrasts[first, second] = Contrast(first, second, interval, interval.p_value, *values.shape[1:])
    made = [contrasts[pair] for pair in pairs if pair in contrasts]
    corrected = holm([one.p_value for one in made])
    return [replace(one, p_value=p_value) for one, p_value in zip(made, corrected, strict=True)]


def mean_intervals(scores: Mapping[str, BySeed], strata: Sequence[int] = ()) -> dict[str, tuple[float, float]]:
    """The 95 % bootstrap interval of each method's mean, over its seeds and examples; none of a single number.

    ``strata`` are as in `contrast`.

    Raises:
        LamellaError: the seeds of a method have different numbers of examples, or none.
    """
    by_seeds: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, by_seed in scores.items():
        if by_seed:
            by_seeds.setdefault((np.size(next(iter(by_seed.values()))), tuple(sorted(by_seed))), []).append(name)
    intervals: dict[str, tuple[float, float]] = {}
    for (_, seeds), names in by_seeds.items():
        values = _stacked([[scores[name][seed] for seed in seeds] for name in names], strata)
        if values[0].size == 1:
            continue
        means = resampled_means(values, strata=strata)
        for name, mean, drawn in zip(names, values.mean((1, 2)), means, strict=True):
            interval = _interval(float(mean), drawn)
            intervals[name] = (interval.low, interval.high)
    return {name: intervals[name] for name in scores if name in intervals}


def paired_interval(
    first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interval of mean(first - second), drawing seeds and examples with replacement, the same ones for both sides.

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
    return _interval(float(difference.mean()), resampled_means(difference[None], resamples, seed)[0], level)


def ratio_interval(
    difference: Floats, weights: Floats, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interval of sum(difference) / sum(weights), drawing texts with replacement, numerator and denominator together.

    A mean per token whose texts, not tokens, are independent. Where all texts count the same it is `paired_interval`.

    Args:
        difference: the text's sum under one model less that under the other, ``(texts,)``.
        weights: its tokens, ``(texts,)``, not all 0.
        level: coverage of the percentile interval.
        resamples: bootstrap draws; those that drew no token at all do not count.
        seed: of the draws.

    Raises:
        LamellaError: there are no texts, or none has a token.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, §13.3; ratio estimator as in §10.3 there.
    """
    if not np.any(weights > 0):
        raise LamellaError("An interval of a mean per token needs at least one text with tokens, and here is none.")
    sums, tokens = resampled_means(np.stack([difference, weights])[:, None], resamples, seed)  # (draws,), (draws,)
    counted = tokens > 0
    return _interval(float(difference.sum() / weights.sum()), sums[counted] / tokens[counted], level)


def resampled_means(values: Floats, draws: int = RESAMPLES, seed: int = 0, strata: Sequence[int] = ()) -> Floats:
    """Means of values (methods, seeds, examples) over drawn seeds and examples, the same for all: (methods, draws).

    Of several strata as many examples are drawn of each as it has.
    """
    methods, seeds, examples = values.shape
    generator = np.random.default_rng(seed)
    flat = values.reshape(methods * seeds, examples).T
    chunk = max(1, _CHUNK_ENTRIES // examples)
    means = []
    for done in range(0, draws, chunk):
        count = min(chunk, draws - done)
        seed_counts = _counts(generator, count, seeds)  # (draws, seeds)
        example_counts = np.hstack(
            [_counts(generator, count, size) for size in strata or [examples]]
        )  # (draws, examples)
        by_seed = (example_counts @ flat).reshape(count, methods, seeds)
        means.append(np.einsum("dms,ds->md", by_seed, seed_counts) / (seeds * examples))
    return np.concatenate(means, axis=1)


def spearman(first: Floats, second: Floats) -> Floats:
    """Rank correlation of each row of ``first`` with that of ``second``, ties in the middle; NaN where one is constant.

    Args:
        first: ``(rows, N)``, or ``(1, N)`` for the same one every time.
        second: alike.
    """
    from scipy.stats import rankdata

    x, y = (rankdata(side, axis=1) for side in (first, second))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1)))


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


def _stacked(scores: Sequence[Sequence[npt.ArrayLike]], strata: Sequence[int] = ()) -> Floats:
    """(methods, seeds, examples), scaled so that the mean over examples is the mean over the strata's means."""
    sizes = sorted({np.size(one) for by_seed in scores for one in by_seed})
    if len(sizes) > 1:
        raise LamellaError(
            f"Methods are compared on the same examples, but some have {sizes[0]} scores and some {sizes[-1]}. Score "
            "all of them on the same split."
        )
    if sizes == [0]:
        raise LamellaError("Methods are compared by their scores of examples, and here are none. Score rows first.")
    values = np.asarray(scores, np.float64).reshape(len(scores), -1, sizes[0])
    if not strata:
        return values
    if sum(strata) != sizes[0] or min(strata) < 1:
        raise LamellaError(f"The tasks have {sum(strata)} examples, and {sizes[0]} are scored. Score all of each task.")
    return values * np.repeat([sizes[0] / len(strata) / count for count in strata], strata)


def _interval(difference: float, drawn: Floats, level: float = 0.95) -> Interval:
    drawn = np.where(np.abs(drawn) < 1e-12, 0.0, drawn)  # sums in another order leave dust where methods are equal
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    rarer = min(int((drawn <= 0.0).sum()), int((drawn >= 0.0).sum()))
    p_value = min(1.0, 2.0 * (rarer + 1) / (len(drawn) + 1))
    return Interval(difference, float(low), float(high), level, len(drawn), p_value)


def _counts(generator: np.random.Generator, draws: int, size: int) -> Floats:
    """How often each of ``size`` is drawn when ``size`` are drawn with replacement: (draws, size)."""
    drawn = generator.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)


def perplexity(nll: float, tokens: int) -> float:
    """Exponential of the negative log-likelihood per token; ``nll`` in nats, summed over ``tokens`` tokens."""
    if tokens == 0:
        raise LamellaError("Perplexity needs at least one predicted token; every label here is masked or missing.")
    # beyond this the float overflows; the honest value is then infinity
    return math.exp(nll / tokens) if nll / tokens < 700.0 else math.inf
