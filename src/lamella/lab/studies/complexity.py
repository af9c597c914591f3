"""How complex a text is, by four plain measures, and whether deeper layers are chosen for complex texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError
from lamella.lab.studies.layer_maps import check_decisions
from lamella.statistics import spearman

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_TOKEN = re.compile(_WORD.pattern + r"|[.!?]+(?=\s|$)|[()\[\]{},;:]|\s[-\u2013\u2014]+\s")
_VOWELS = re.compile(r"[aeiouy]+")
_SILENT_E = re.compile(r"(?<![aeiouy])(?<!l)e$|(?<=[aeiouy]l)e$")
_SUBORDINATORS = frozenset(
    _WORD.findall(
        "after although because before if lest once since that though unless until what whatever when whenever where "
        "whereas wherever whether which while who whoever whom whose why how"
    )
)
_CHUNK_ENTRIES = 2_000_000


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, apostrophes inside them kept; digits are none."""
    return [word.lower() for word in _WORD.findall(text)]


def syllables(word: str) -> int:
    """Runs of vowels (a e i o u y), one less for a final silent e, at least 1. Letters only, no dictionary.

    A final e is silent after a consonant other than l, and after a vowel and l: `make` and `whale` have one syllable,
    `table` two. Hiatus (`naive`, `being`) is counted too short.
    """
    word = word.lower()
    return max(1, len(_VOWELS.findall(word)) - (1 if _SILENT_E.search(word) else 0))


def readability(text: str) -> float:
    """Flesch-Kincaid grade: 0.39 words/sentences + 11.8 syllables/words - 15.59; NaN for a text without words.

    A sentence ends at a run of . ! ? before white space or the text's end; a text has at least one.

    Source: Kincaid, Fishburne, Rogers & Chissom, Research Branch Report 8-75, 1975.
    """
    words = words_of(text)
    if not words:
        return math.nan
    sentences = max(1, len(_SENTENCE_END.findall(text.strip())))
    return 0.39 * len(words) / sentences + 11.8 * sum(map(syllables, words)) / len(words) - 15.59


def clause_depth(text: str) -> int:
    """A proxy for the depth of the parse tree, without a parser: the most brackets and clauses open at once.

    Reading from the left, an opening bracket ( [ { opens a level and its closing one ends it, with all clauses opened
    inside. A subordinator or relative word (that, which, who, because, if, ...) opens a clause, except as the first
    word of a sentence, where it asks or leads. A comma, semicolon, colon or spaced dash ends the clause opened last
    in the innermost bracket; the end of the sentence ends everything.
    """
    open_clauses, deepest, at_start = [0], 0, True  # clauses open in each bracket, the outermost first
    for token in _TOKEN.findall(text):
        mark = token.strip()
        if mark[0] in ".!?":
            open_clauses, at_start = [0], True
            continue
        if mark[0] in "([{":
            open_clauses.append(0)
        elif mark[0] in ")]}":
            open_clauses = open_clauses[:-1] or [0]
        elif mark[0] in ",;:-\u2013\u2014":
            open_clauses[-1] = max(0, open_clauses[-1] - 1)
        else:
            open_clauses[-1] += mark.lower() in _SUBORDINATORS and not at_start
            at_start = False
        deepest = max(deepest, sum(open_clauses) + len(open_clauses) - 1)
    return deepest


class Rarity:
    """How rare a text's words are in a corpus: mean of -ln((count + 1) / (words + distinct + 1)), in nats.

    Add-one smoothing over the distinct words of the corpus and one more that stands for all others.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        self._counts = Counter(word for text in corpus for word in words_of(text))
        if not self._counts:
            raise LamellaError("Word rarity is counted in training texts, and those given have no words.")
        self._total = self._counts.total() + len(self._counts) + 1

    def __call__(self, text: str) -> float:
        """The rarity of a text; NaN if it has no words."""
        words = words_of(text)
        if not words:
            return math.nan
        return sum(-math.log((self._counts[word] + 1) / self._total) for word in words) / len(words)


def complexity(texts: Sequence[str], corpus: Sequence[str], lengths: npt.ArrayLike | None = None) -> pd.DataFrame:
    """A row per text with the columns length, rarity, readability and depth.

    Args:
        texts: the texts a model reads.
        corpus: the training texts, in which words are rare or common.
        lengths: real tokens of each text (len(texts),); its words if absent.

    Raises:
        LamellaError: not one length per text, or a corpus without words.
    """
    import pandas as pd

    counted = np.asarray([len(words_of(text)) for text in texts] if lengths is None else lengths)
    if counted.shape != (len(texts),):
        raise LamellaError(
            f"{len(texts)} texts were given with lengths of shape {counted.shape}; give one length each."
        )
    return pd.DataFrame(
        {
            "length": counted,
            "rarity": list(map(Rarity(corpus), texts)),
            "readability": list(map(readability, texts)),
            "depth": list(map(clause_depth, texts)),
        }
    )


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of ``count`` pairs.

    ``low`` and ``high`` bound the percentile interval of a bootstrap over the pairs; ``p_value`` is two-sided, from
    permutations, each side counting the observed one, so never 0.
    """

    rho: float
    low: float
    high: float
    p_value: float
    count: int


def rank_correlation(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Spearman's correlation of two arrays (N,), with bootstrap interval and permutation p-value.

    Pairs with a NaN are left out. Where one side is constant the correlation is 0 and the p-value 1.

    Raises:
        LamellaError: unlike shapes, or fewer than three pairs.

    Source: Spearman 1904; Efron & Tibshirani, An Introduction to the Bootstrap, 1993, §13.3 and §15.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise LamellaError(f"A correlation pairs two arrays (N,), but these have shapes {a.shape} and {b.shape}.")
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 3:
        raise LamellaError(f"A rank correlation of {len(a)} pairs says nothing. Give at least three.")
    generator = np.random.default_rng(seed)
    rho = float(np.nan_to_num(spearman(a[None], b[None]))[0])
    drawn, permuted = [], []
    for size in _chunks(resamples, len(a)):
        at = generator.integers(len(a), size=(size, len(a)))
        drawn.append(spearman(a[at], b[at]))
        permuted.append(spearman(a[None], generator.permuted(np.tile(b, (size, 1)), axis=1)))
    low, high = np.quantile(np.nan_to_num(np.concatenate(drawn)), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    # equal ranks can give sums that differ in the last bit
    as_large = int((np.abs(np.nan_to_num(np.concatenate(permuted))) >= abs(rho) - 1e-12).sum())
    return Correlation(rho, float(low), float(high), (as_large + 1) / (resamples + 1), len(a))


def _chunks(resamples: int, entries: int) -> list[int]:
    chunk = max(1, _CHUNK_ENTRIES // entries)
    return [min(chunk, resamples - done) for done in range(0, resamples, chunk)]


def chosen_depth(decisions: pd.DataFrame) -> pd.Series:
    """How much deeper than themselves a text's layers choose: the mean of chosen - layer over its decisions, by row.

    Where every text decides at the same layers, this ranks texts as the mean chosen layer does.

    Args:
        decisions: columns row, layer and chosen, as in `lamella.lab.studies.layer_maps`.
    """
    check_decisions(decisions)
    depth: pd.Series = (decisions["chosen"] - decisions["layer"]).groupby(decisions["row"]).mean()
    return depth


def depth_correlations(
    measures: pd.DataFrame, policies: Mapping[str, pd.DataFrame], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Does depth follow complexity? A line per policy and measure: policy, measure, rho, low, high, p, texts.

    The decisions of the random policy belong among them: what they reach is not a property of a learned router.

    Args:
        measures: a line per text, as `complexity` gives it; its index names the texts.
        policies: decisions (see `lamella.lab.studies.layer_maps`) by the name of the policy; ``row`` is in that index.

    Raises:
        LamellaError: decisions about a text that has no measures.
    """
    import pandas as pd

    rows = []
    for policy, decisions in policies.items():
        depth = chosen_depth(decisions)
        if unknown := sorted(set(depth.index) - set(measures.index)):
            raise LamellaError(f"The decisions of '{policy}' name the text {unknown[0]}, which has no measures.")
        for measure in measures.columns:
            correlation = rank_correlation(measures.loc[depth.index, measure], depth, resamples=resamples, seed=seed)
            rows.append(
                (
                    policy,
                    measure,
                    correlation.rho,
                    correlation.low,
                    correlation.high,
                    correlation.p_value,
                    correlation.count,
                )
            )
    return pd.DataFrame(rows, columns=["policy", "measure", "rho", "low", "high", "p", "texts"])
