"""Controls: which numbers of an alignment say more than chance, variance or the seed would."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from lamella.backbones.moe import Expert
from lamella.errors import LamellaError
from lamella.similarity.alignment.frozen import with_matrices
from lamella.similarity.pairs import NAMES, Name

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def random_expert(expert: Expert, name: Name, seed: int) -> Expert:
    """An expert of the same shapes whose matrices are drawn normal with the means and deviations of this one's."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *name]).generate_state(1)[0]))
    drawn = {
        field: torch.randn(one.shape, generator=generator).to(one) * one.std(unbiased=False) + one.mean()
        for field, one in expert.matrices.items()
    }
    return with_matrices(expert, drawn)


def beyond_controls(frame: pd.DataFrame) -> pd.DataFrame:
    """Whether each row is better than its controls by more than the choice of held-out documents explains.

    Args:
        frame: an alignment.

    Returns:
        The frame with ``beyond_mean``, ``beyond_identity`` and ``beyond_random`` (against the mean predictor, the
        target without aligner, and a random expert behind a trained aligner, each of the same source: the upper end of
        the 95 % interval of the difference in nmse is below 0; False where there is none) and ``beyond``, all three.
        With many rows some are beyond by chance: one in forty for each control where nothing differs.

    Raises:
        LamellaError: the frame is not an alignment.
    """
    controls = ("mean", "identity", "random")
    if missing := [name for name in controls if f"over_{name}" not in frame.columns]:
        raise LamellaError(f"The table has no column over_{missing[0]}; give the table that align returned.")
    comparisons = {f"beyond_{name}": frame[f"over_{name}"] < 0 for name in controls}
    return frame.assign(**comparisons, beyond=np.logical_and.reduce(list(comparisons.values())))


def seed_ceiling(frame: pd.DataFrame) -> dict[str, float]:
    """How well one seed ranks the pairs as the other seeds do: no other measure can be expected to do better.

    Args:
        frame: alignments of one aligner with two seeds or more, put together.

    Returns:
        ``overall``: rank correlation of one seed's nmse with the mean over the other seeds, mean over seeds;
        ``within``: the same within each source, mean over sources too; ``seeds``: how many. NaN where no seed changes
        anything, as of the identity.

    Raises:
        LamellaError: fewer than two seeds, or more than one aligner.
    """
    pairs = frame[frame["kind"] == "pair"]
    if pairs["seed"].nunique() < 2 or pairs["aligner"].nunique() != 1:
        raise LamellaError(
            "A seed ceiling needs the pairs of one aligner with two seeds or more; align again with seed=1."
        )
    seeds = pairs.pivot_table(index=NAMES, columns="seed", values="nmse").dropna()  # a row per pair
    if seeds.eq(seeds.iloc[:, 0], axis=0).all(axis=None):
        return {"overall": float("nan"), "within": float("nan"), "seeds": float(len(seeds.columns))}
    ranked = [rank_agreement(seeds[seed], seeds.drop(columns=seed).mean(axis=1)) for seed in seeds.columns]
    overall, within = zip(*ranked, strict=True)
    return {"overall": mean_of_known(overall), "within": mean_of_known(within), "seeds": float(len(ranked))}


def rank_agreement(one: pd.Series, other: pd.Series) -> tuple[float, float]:
    """Rank correlation of two measures of the same pairs: over all, and within each source, mean over sources.

    NaN where there is none: for fewer than three pairs, and where one measure does not vary.

    Args:
        one, other: by source_layer, source_expert, target_layer, target_expert; pairs that lack one are left out.
    """
    import pandas as pd

    both = pd.concat({"one": one, "other": other}, axis=1, join="inner").dropna()
    within = [_rank_correlation(of_source) for _, of_source in both.groupby(level=NAMES[:2])]
    return _rank_correlation(both), mean_of_known(within)


def mean_of_known(values: Iterable[float]) -> float:
    """The mean of those that are not NaN; NaN where all are."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else float("nan")


def _rank_correlation(both: pd.DataFrame) -> float:
    if len(both) < 3 or both.nunique().min() < 2:
        return float("nan")
    return float(both["one"].rank().corr(both["other"].rank()))
