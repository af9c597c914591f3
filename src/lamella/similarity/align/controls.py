"""Controls: which numbers of an alignment say more than chance, variance or the seed would."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lamella.backbones.moe import Expert
from lamella.errors import LamellaError
from lamella.similarity.align.frozen import with_matrices
from lamella.similarity.align.sources import Name

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
        LamellaError: the frame is no alignment.
    """
    controls = ("mean", "identity", "random")
    if missing := [name for name in controls if f"over_{name}" not in frame.columns]:
        raise LamellaError(f"The table has no column over_{missing[0]}; give the table that align returned.")
    verdicts = {f"beyond_{name}": frame[f"over_{name}"] < 0 for name in controls}
    return frame.assign(**verdicts, beyond=np.logical_and.reduce(list(verdicts.values())))


def seed_ceiling(frame: pd.DataFrame) -> dict[str, float]:
    """How well one seed ranks the pairs as the other seeds do: no other measure can be expected to do better.

    Args:
        frame: alignments of one aligner with two seeds or more, put together.

    Returns:
        ``overall``: rank correlation of one seed's nmse with the mean over the other seeds, mean over seeds;
        ``within``: the same within each source, mean over sources too; ``seeds``: how many.

    Raises:
        LamellaError: fewer than two seeds, or more than one aligner.
    """
    pairs = frame[frame["kind"] == "pair"]
    if pairs["seed"].nunique() < 2 or pairs["aligner"].nunique() != 1:
        raise LamellaError(
            "A seed ceiling needs the pairs of one aligner with two seeds or more; align again with seed=1."
        )
    names = ["source_layer", "source_expert", "target_layer", "target_expert"]
    seeds = pairs.pivot_table(index=names, columns="seed", values="nmse").dropna()  # a row per pair
    overall, within = [], []
    for seed in seeds.columns:
        both = seeds.assign(one=seeds[seed], others=seeds.drop(columns=seed).mean(axis=1))[["one", "others"]]
        overall.append(_rank_correlation(both))
        within += [_rank_correlation(of_source) for _, of_source in both.groupby(level=names[:2]) if len(of_source) > 2]
    return {
        "overall": float(np.nanmean(overall)),
        "within": float(np.nanmean(within)) if within else float("nan"),
        "seeds": float(len(seeds.columns)),
    }


def _rank_correlation(both: pd.DataFrame) -> float:
    return float(both["one"].rank().corr(both["others"].rank()))
