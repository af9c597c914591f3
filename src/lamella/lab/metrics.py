"""Scores of predictions against labels, on numpy arrays."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError

Array = npt.NDArray[np.generic]


def accuracy(predictions: Array, labels: Array) -> float:
    """Share of equal entries; both arrays (N,)."""
    return float(np.mean(predictions == labels))


def macro_f1(predictions: Array, labels: Array) -> float:
    """Unweighted mean of the F1 of every class that occurs in the labels or the predictions; both arrays (N,)."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro"))


def matthews(predictions: Array, labels: Array) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004); 0 if one side is constant; both arrays (N,)."""
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if _constant(predictions, labels) else float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Array, labels: Array) -> float:
    """Linear correlation; 0 where one side is constant; both arrays (N,)."""
    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    return 0.0 if _constant(x, y) else float(np.corrcoef(x, y)[0, 1])


def spearman(predictions: Array, labels: Array) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one side is constant; both arrays (N,)."""
    from scipy.stats import rankdata

    return pearson(rankdata(predictions), rankdata(labels))


def _constant(predictions: Array, labels: Array) -> bool:
    return bool(np.all(predictions == predictions[0]) or np.all(labels == labels[0]))


def mean_squared_error(predictions: Array, labels: Array) -> float:
    """Mean of the squared differences; both arrays (N,)."""
    return float(np.mean((predictions.astype(np.float64) - labels.astype(np.float64)) ** 2))


@dataclass(frozen=True)
class Metric:
    """A score by name; ``function`` takes predictions (N,) and labels (N,)."""

    name: str
    function: Callable[[Array, Array], float]
    greater_is_better: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy),
        Metric("macro_f1", macro_f1),
        Metric("matthews", matthews),
        Metric("pearson", pearson),
        Metric("spearman", spearman),
        Metric("mean_squared_error", mean_squared_error, greater_is_better=False),
    )
}


def metric_for(name: str) -> Metric:
    """The metric of that name; raises `LamellaError` with the nearest known name."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise LamellaError(f"There is no metric '{name}'. {hint}Known are {', '.join(METRICS)}.")
