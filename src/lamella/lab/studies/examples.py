"""The scores of single examples, which a paired comparison resamples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from lamella.statistics import paired_interval

# metrics that are the mean of a column of predictions.parquet: what a bootstrap over examples can resample
_COLUMNS = {"accuracy": "correct", "mean_squared_error": "squared_error"}


def example_scores(metric: str, runs: Sequence[Path]) -> npt.NDArray[np.float64] | None:
    """Scores of the test examples (runs, examples) by folder of a run; None where the metric is not their mean."""
    column = _COLUMNS.get(metric)
    if column is None:
        return None
    frames = [pd.read_parquet(run / "predictions.parquet", columns=["split", column]) for run in runs]
    return np.stack([frame.loc[frame["split"] == "test", column].to_numpy(np.float64) for frame in frames])


def interval_around(examples: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of (seeds, examples) or (examples,), over both."""
    interval = paired_interval(examples, np.zeros_like(examples))
    return interval.low, interval.high
