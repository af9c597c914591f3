"""Scores and routing of a model on each of the tasks that it learned side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from lamella.lab.data import Task
from lamella.lab.scoring import Collator, Scores, metrics_of, score, selection
from lamella.statistics import mean_intervals
from lamella.tracing import Trace, record_routing

if TYPE_CHECKING:
    from datasets import Dataset

BY_TASK = "trace_by_task.parquet"


@dataclass(frozen=True)
class TracedScores:
    """Scores by split, and the routing over the rows of all splits.

    Attributes:
        scores: by split.
        trace: of all rows.
        by_task: its frame, of each task by itself, with a column ``task``; None where the task is one.
    """

    scores: dict[str, Scores]
    trace: Trace
    by_task: pd.DataFrame | None


def scores_of(
    model: nn.Module,
    task: Task,
    splits: Mapping[str, Dataset],
    collator: Collator,
    batch_size: int,
    watching: Callable[[Task], AbstractContextManager[Any]] = lambda part: nullcontext(),
) -> dict[str, Scores]:
    """`score` of each split, task by task; ``watching`` is entered around the rows of each task."""
    if not task.parts:
        return {name: score(model, task, rows, collator, batch_size) for name, rows in splits.items()}
    found: dict[str, list[Scores]] = {name: [] for name in splits}
    for part in task.parts:
        with watching(part):
            for name, rows in splits.items():
                own = rows.select(np.flatnonzero(np.asarray(rows["task"]) == part.name))
                if len(own):
                    found[name].append(score(model, task, own, collator, batch_size))
    return {name: _joined(task, some) for name, some in found.items()}


def traced_scores(
    model: nn.Module, task: Task, splits: Mapping[str, Dataset], collator: Collator, batch_size: int
) -> TracedScores:
    """`scores_of` a model with routers, and what these did meanwhile; every process of a group has to call it."""
    traces: dict[str, Trace] = {}

    def watching(part: Task) -> AbstractContextManager[Any]:
        recording = ExitStack()
        traces[part.name] = recording.enter_context(record_routing(model))
        return recording

    with record_routing(model) as trace:
        scores = scores_of(model, task, splits, collator, batch_size, watching)
    for one in (trace, *traces.values()):
        one.gather()
    frames = [one.frame.assign(task=name) for name, one in traces.items()]
    return TracedScores(scores, trace, pd.concat(frames, ignore_index=True) if frames else None)


def task_scores(task: Task, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per task of several: task, rows, metric, value, and the 95 % bootstrap interval of a mean.

    Args:
        task: of several parts.
        columns: as `Scores.columns`.
    """
    rows = []
    for part in task.parts:
        own = {name: np.asarray(column)[columns["task"] == part.name] for name, column in columns.items()}
        if not len(own["task"]):
            continue
        metric = "accuracy" if "correct" in own else selection(part).name
        interval = mean_intervals({"": {0: own["correct"]}}).get("") if "correct" in own else None
        value = metrics_of(part, own)[metric]
        rows.append(
            {"task": part.name, "rows": len(own["task"]), "metric": metric, "value": value, "interval": interval}
        )
    return rows


def differences(by_task: pd.DataFrame) -> pd.DataFrame:
    """How unlike tasks are routed: a row per pair of tasks, stack and layer, with the distance of their use of experts.

    Half the sum over experts of the absolute difference of their mean weights (total variation), each task's weights
    made to add up to 1, mean over a layer's routers: 0 where both use the experts alike, 1 where they share none.
    """
    place = ["stack", "layer", "module"]
    weights = by_task.pivot_table(index=[*place, "expert"], columns="task", values="mean_weight", sort=False)
    weights = weights / weights.groupby(place, sort=False).transform("sum")
    tasks = list(weights.columns)
    rows = []
    for at, one in enumerate(tasks):
        for other in tasks[at + 1 :]:
            apart = (weights[one] - weights[other]).abs().groupby(place, sort=False).sum() / 2
            for (stack, layer), value in apart.groupby(["stack", "layer"], sort=False).mean().items():
                rows.append({"task": one, "other": other, "stack": stack, "layer": layer, "difference": float(value)})
    return pd.DataFrame(rows, columns=["task", "other", "stack", "layer", "difference"])


def _joined(task: Task, some: list[Scores]) -> Scores:
    columns = {name: np.concatenate([one.columns[name] for one in some]) for name in some[0].columns}
    return Scores(metrics_of(task, columns), columns)
