"""How sure the difference of two ratios is: the paired bootstrap over texts that weigh differently."""

import numpy as np
import numpy.typing as npt

from lamella.statistics import Interval

_CHUNK_ENTRIES = 2_000_000
Array = npt.NDArray[np.float64]


def ratio_interval(
    difference: Array, weights: Array, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of sum(difference) / sum(weights), drawing texts with replacement, numerator and denominator together.

    A mean per token whose texts, not tokens, are independent. Where all texts weigh the same it is what
    ``evaluation.intervals.paired_interval`` computes.

    Args:
        difference: the text's sum under one model less that under the other, ``(texts,)``.
        weights: its tokens, ``(texts,)``, not all 0.
        level: coverage of the percentile interval.
        resamples: bootstrap draws; those that drew no token at all do not count.
        seed: of the draws.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, §13.3; ratio estimator as in §10.3 there.
    """
    texts = len(difference)
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ENTRIES // texts)
    columns = np.stack([difference, weights], axis=1)  # (texts, 2)
    drawn = np.concatenate(
        [
            generator.multinomial(texts, np.full(texts, 1.0 / texts), size=min(chunk, resamples - done)) @ columns
            for done in range(0, resamples, chunk)
        ]
    )  # (resamples, 2)
    drawn = drawn[drawn[:, 1] > 0]
    ratios = drawn[:, 0] / drawn[:, 1]
    low, high = np.quantile(ratios, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    rarer = min(int((ratios <= 0.0).sum()), int((ratios >= 0.0).sum()))
    p_value = min(1.0, 2.0 * (rarer + 1) / (len(ratios) + 1))
    return Interval(float(difference.sum() / weights.sum()), float(low), float(high), level, len(ratios), p_value)
