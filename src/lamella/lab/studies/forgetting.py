"""What learning tasks one after the other keeps: measures of the scores on each task after each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lamella.lab.studies.results import Floats


def overall_performance(scores: Floats) -> float:
    """OP: the mean over tasks of the scores after the last stage.

    Args:
        scores: (stages, tasks), after stage k on task i, tasks in the order in which they were learned.

    Source: Gao et al., MoLA, 2024 (arXiv 2402.08562), App. C.
    """
    return float(scores[-1].mean())


def performance_drop(scores: Floats) -> float:
    """PD: 2 / (t (t - 1)) times the sum of what each stage changed on each task learned before; negative is forgetting.

    A task's changes add up to its last score less that of the stage that learned it, so that PD is 2 / t times
    `backward_transfer`.

    Args:
        scores: as in `overall_performance`; at least two stages.

    Source: Gao et al., MoLA, 2024 (arXiv 2402.08562), App. C.
    """
    stages = len(scores)
    steps = [scores[k, i] - scores[k - 1, i] for k in range(1, stages) for i in range(k)]
    return float(2.0 / (stages * (stages - 1)) * sum(steps))


def backward_transfer(scores: Floats) -> float:
    """BWT: mean over all tasks but the last of the last score less that of the stage that learned the task.

    Args:
        scores: as in `performance_drop`.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017, eq. 3.
    """
    return float((scores[-1] - np.diagonal(scores))[:-1].mean())


def forgetting(scores: Floats) -> float:
    """Mean over all tasks but the last of the best score from when the task was learned to the stage before the last,
    less the last one.

    Args:
        scores: as in `performance_drop`.

    Source: Chaudhry et al., Riemannian Walk for Incremental Learning, 2018, §3.2.
    """
    last = len(scores) - 1
    return float(np.mean([scores[i:last, i].max() - scores[last, i] for i in range(last)]))


@dataclass(frozen=True)
class Measure:
    """A measure by its name in tables."""

    name: str
    function: Callable[[Floats], float]
    greater_is_better: bool = True


MEASURES = (
    Measure("OP", overall_performance),
    Measure("BWT", backward_transfer),
    Measure("PD", performance_drop),
    Measure("forgetting", forgetting, greater_is_better=False),
)


def example_scores(learned: Mapping[str, Floats], last: Mapping[str, Floats]) -> dict[str, dict[str, Floats]]:
    """Scores of single examples by measure and task, whose mean over tasks of the tasks' means is the measure.

    Args:
        learned: by task, in the order of learning, whether each example was right after the stage that learned it.
        last: the same after the last stage.
    """
    stages = len(last)
    final = list(last)[-1]
    change = {task: (last[task] - learned[task]) * (0.0 if task == final else 1.0) for task in last}
    return {
        "OP": dict(last),
        "BWT": {task: one * stages / (stages - 1) for task, one in change.items()},
        "PD": {task: one * 2 / (stages - 1) for task, one in change.items()},
    }
