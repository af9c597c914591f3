"""A study's rows as tables: every score in a tidy frame, methods side by side, and how sure their differences are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lamella.lab.data import Task
from lamella.lab.runs.floors import FLOOR, MAJORITY, floor_predictions
from lamella.lab.runs.metrics import METRICS, metric_for
from lamella.lab.runs.scoring import selection
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies.examples import example_scores, interval_around
from lamella.lab.studies.grid import Cell, Grid
from lamella.lab.studies.rows import StudyFolder
from lamella.statistics import Interval, holm, paired_interval

_COSTS = (
    "trainable_parameters",
    "train_seconds",
    "seconds_per_step",
    "tokens",
    "peak_memory_bytes",
    "steps",
    "kept_step",
)
# floor, then split, then metric
Floors = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Difference:
    """A method minus the reference, on the seeds that both have; ``corrected`` is Holm's p-value over the methods."""

    method: str
    interval: Interval
    corrected: float
    seeds: int


@dataclass(frozen=True)
class Contest:
    """The methods on one backbone and task.

    Attributes:
        rows: the row of each method and seed; None where it was not run.
        floors: scores of the floors, by floor, split and metric; floor_intervals of their test accuracy.
        examples: per-example test scores, by method and seed.
        differences: every other method against the reference; empty where the metric is no mean over examples.
    """

    backbone: str
    task: Task
    metric: str
    cells: dict[str, dict[int, Cell]]
    rows: dict[str, dict[int, dict[str, Any] | None]]
    floors: Floors
    floor_intervals: dict[str, tuple[float, float]]
    examples: dict[str, dict[int, Any]]
    differences: list[Difference]

    def tests(self, method: str, split: str = "test") -> dict[int, float]:
        """The main metric of a method by seed, where it was run."""
        return {
            seed: row["metrics"][split][self.metric]
            for seed, row in self.rows[method].items()
            if row is not None and split in row["metrics"]
        }


def contests(grid: Grid, cells: Sequence[Cell], folder: StudyFolder) -> list[Contest]:
    """One contest per backbone and task; a task's floors are computed once."""
    floors: dict[str, tuple[Task, Floors, dict[str, tuple[float, float]]]] = {}
    found = []
    for backbone, name in product(grid.backbones, grid.tasks):
        here = [cell for cell in cells if (cell.backbone, cell.task) == (backbone, name)]
        if name not in floors:
            task = task_of(here[0].settings)
            floors[name] = (task, *_floors(task))
        found.append(_contest(grid, backbone, *floors[name], here, folder))
    return found


def _contest(
    grid: Grid,
    backbone: str,
    task: Task,
    floors: Floors,
    floor_intervals: dict[str, tuple[float, float]],
    cells: Sequence[Cell],
    folder: StudyFolder,
) -> Contest:
    by_method: dict[str, dict[int, Cell]] = {name: {} for name in grid.methods}
    for cell in cells:
        by_method[cell.method][cell.seed] = cell
    rows = {name: {seed: folder.row(cell.key) for seed, cell in own.items()} for name, own in by_method.items()}
    metric = selection(task).name
    examples: dict[str, dict[int, Any]] = {name: {} for name in by_method}
    for name, own in by_method.items():
        for seed, cell in own.items():
            if rows[name][seed] is not None and "test" in task.splits:
                scores = example_scores(metric, [folder.run(cell.key)])
                if scores is not None:
                    examples[name][seed] = scores[0]
    differences = _differences(grid.reference_name, examples)
    return Contest(backbone, task, metric, by_method, rows, floors, floor_intervals, examples, differences)


def _differences(reference: str, examples: Mapping[str, Mapping[int, Any]]) -> list[Difference]:
    intervals = []
    for name, own in examples.items():
        seeds = [seed for seed in own if seed in examples[reference]]
        if name != reference and seeds:
            sides = (np.stack([side[seed] for seed in seeds]) for side in (own, examples[reference]))
            intervals.append((name, paired_interval(*sides), len(seeds)))
    corrected = holm([interval.p_value for _, interval, _ in intervals])
    return [
        Difference(name, interval, p, seeds) for (name, interval, seeds), p in zip(intervals, corrected, strict=True)
    ]


def _floors(task: Task) -> tuple[Floors, dict[str, tuple[float, float]]]:
    scores: Floors = {}
    around: dict[str, tuple[float, float]] = {}
    for name, predictions in floor_predictions(task).items():
        scores[name] = {}
        for split, guessed in predictions.items():
            labels = np.asarray(task.splits[split]["label"])
            names = (
                {task.metric, "mean_squared_error"}
                if task.kind == "regression"
                else {task.metric, "accuracy", "macro_f1"}
            )
            scores[name][split] = {one: metric_for(one).function(guessed, labels) for one in sorted(names)}
            if split == "test" and task.metric == "accuracy":
                around[name] = interval_around((guessed == labels).astype(np.float64))
    return scores, around


def tidy(contests: Sequence[Contest]) -> pd.DataFrame:
    """A row per cell, split and metric, with the floors, the cell's costs and the key of its settings.

    Columns: backbone, task, method, seed, split, metric, value, greater_is_better, floor_linear, floor_majority,
    status ("done" or "not run"), key, then the costs. A cell that was not run has one row without values.
    """
    rows = []
    for contest in contests:
        for method, own in contest.cells.items():
            for seed, cell in own.items():
                place = {"backbone": contest.backbone, "task": contest.task.name, "method": method, "seed": seed}
                rows += [place | row | {"key": cell.key} for row in _cell_rows(contest, contest.rows[method][seed])]
    order = ["backbone", "task", "method", "seed", "split", "metric", "value", "greater_is_better"]
    order += ["floor_linear", "floor_majority", "status", "key", *_COSTS]
    return pd.DataFrame(rows, columns=order)


def _cell_rows(contest: Contest, row: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if row is None:
        better = selection(contest.task).greater_is_better
        return [{"split": "test", "metric": contest.metric, "greater_is_better": better, "status": "not run"}]
    metrics = row["metrics"]
    costs = {name: metrics[name] for name in _COSTS}
    return [
        {
            "split": split,
            "metric": metric,
            "value": value,
            "greater_is_better": metric in METRICS and METRICS[metric].greater_is_better,
            "floor_linear": contest.floors.get(FLOOR, {}).get(split, {}).get(metric),
            "floor_majority": contest.floors.get(MAJORITY, {}).get(split, {}).get(metric),
            "status": "done",
            **costs,
        }
        for split in ("validation", "test")
        if split in metrics
        for metric, value in metrics[split].items()
    ]


def results_table(contests: Sequence[Contest], grid: Grid) -> pd.DataFrame:
    """A row per floor and method: task, metric, validation, a column per seed, mean, interval, and the difference
    from the reference with its interval and Holm's p-value. Empty cells were not run.
    """
    rows = []
    for contest in contests:
        task = contest.task.name if len(grid.backbones) == 1 else f"{contest.task.name}, {contest.backbone}"
        place = {"task": task, "metric": contest.metric}
        rows += [{"method": name} | place | _floor_row(contest, name, grid) for name in contest.floors]
        rows += [{"method": name} | place | _method_row(contest, name, grid) for name in contest.rows]
    columns = [
        "method",
        "task",
        "metric",
        "validation",
        *(f"seed {seed}" for seed in grid.seed_list),
        "mean",
        "interval",
    ]
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*columns, *[name for name in ("difference", "p") if name in frame.columns]])


def _floor_row(contest: Contest, name: str, grid: Grid) -> dict[str, Any]:
    scores = contest.floors[name]
    score = scores.get("test", {}).get(contest.metric)
    return {
        "validation": scores.get("validation", {}).get(contest.metric),
        # a floor has no randomness: it is the same for every seed
        **{f"seed {seed}": score for seed in grid.seed_list},
        "mean": score,
        "interval": contest.floor_intervals.get(name),
        # words, because an empty cell says that something was not run
        "difference": "floor",
        "p": "",
    }


def _method_row(contest: Contest, name: str, grid: Grid) -> dict[str, Any]:
    tests, validation = contest.tests(name), contest.tests(name, "validation")
    examples = list(contest.examples[name].values())
    found = next((one for one in contest.differences if one.method == name), None)
    row: dict[str, Any] = {
        "validation": float(np.mean(list(validation.values()))) if validation else None,
        **{f"seed {seed}": tests.get(seed) for seed in grid.seed_list},
        "mean": float(np.mean(list(tests.values()))) if tests else None,
        "interval": interval_around(np.stack(examples)) if examples else None,
    }
    if name == grid.reference_name:
        return row | {"difference": "reference", "p": ""}
    if found is not None:
        return row | {"difference": str(found.interval), "p": f"{found.corrected:.3g}"}
    return row


def cost_table(contests: Sequence[Contest], grid: Grid) -> pd.DataFrame:
    """A row per method, backbone and task: parameters, median training time, the largest memory, tokens."""
    rows = []
    for contest in contests:
        for name, own in contest.rows.items():
            measured = [row["metrics"] for row in own.values() if row is not None]
            row: dict[str, Any] = {"method": name, "task": contest.task.name, "backbone": contest.backbone}
            if measured:
                row |= {
                    "trainable parameters": measured[0]["trainable_parameters"],
                    "training seconds": float(np.median([one["train_seconds"] for one in measured])),
                    "peak memory MB": max(one["peak_memory_bytes"] for one in measured) / 1e6,
                    "tokens": measured[0]["tokens"],
                }
            rows.append(row)
    return pd.DataFrame(rows)
