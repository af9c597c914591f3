"""What a method reached in one place of a table: in one run, or on several tasks in a run for each; and the floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lamella.errors import UnreadableError
from lamella.lab.runs.floors import FLOOR, MAJORITY, floor_columns
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.plain_text import RISE
from lamella.lab.scoring import Columns, metrics_of, over_tasks
from lamella.lab.studies.cells import Cell
from lamella.lab.studies.results import Floats, place_of

if TYPE_CHECKING:
    from lamella.lab.data import Task
    from lamella.lab.studies.folder import StudyFolder

# metrics that are the mean of a column of predictions.parquet: what a bootstrap over examples can resample
_COLUMNS = {"accuracy": "correct", "mean_squared_error": "squared_error"}
_SUMS = ("build_seconds", "train_seconds", "tokens", "steps", "kept_step")


def by_place(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each backbone, task, method, seed and run: one, one for each of several tasks, or its stages."""
    places: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        places.setdefault((*place_of(cell).values(), cell.run), []).append(cell)
    return list(places.values())


def metrics_of_place(cells: Sequence[Cell], folder: StudyFolder) -> dict[str, Any] | None:
    """What a run measured, or all runs of a place together; None where one of them has not."""
    found: dict[str | None, dict[str, Any]] = {}
    for cell in cells:
        if (row := folder.row(cell.key)) is None:
            return None
        found[cell.part] = row["metrics"]
    together = found[None] if None in found else _united({str(part): metrics for part, metrics in found.items()})
    if "plain_text" in together and "test" in together:
        together = together | {"test": together["test"] | {RISE: together["plain_text"]["rise"]}}
    return together


def _united(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Scores of runs on one task each, as of one run on all of them; and what they cost together."""
    runs = list(parts.values())
    together: dict[str, Any] = {"metric": "accuracy", "greater_is_better": True}
    for split in ("validation", "test"):
        if all(split in run for run in runs):
            together[split] = over_tasks({part: run[split] for part, run in parts.items()})
    together["trainable_parameters"] = sum(run["trainable_parameters"] for run in runs)
    return together | united_costs(runs)


def united_costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several runs cost together: sums, and the largest memory."""
    costs: dict[str, Any] = {name: sum(run[name] for run in runs) for name in _SUMS}
    costs["seconds_per_step"] = costs["train_seconds"] / max(1, costs["steps"])
    costs["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in runs)
    return costs


def examples_of_place(cells: Sequence[Cell], metrics: Mapping[str, Any], folder: StudyFolder) -> list[dict[str, Any]]:
    """Rows of the table of example scores: of each of several tasks, and of the metric that the place is shown by."""
    metric, place = metrics["metric"], place_of(cells[0]) | {"split": "test"}
    rise = [place | {"metric": RISE, "scores": [metrics["test"][RISE]]}] if RISE in metrics["test"] else []
    by_task: dict[str, Floats] = {}
    for cell in cells:
        scores = example_scores(metric, folder.run(cell.key))
        if cell.part is not None and scores is not None:
            by_task[cell.part] = scores
        elif scores is not None:
            by_task |= scores_by_task(folder.run(cell.key))
    if not by_task:
        alone = scores if len(cells) == 1 and scores is not None else [metrics["test"][metric]]
        return [*rise, place | {"metric": metric, "scores": alone}]
    return [
        *rise,
        *(place | {"metric": f"{task}/{metric}", "scores": scores} for task, scores in by_task.items()),
        place | {"metric": metric, "scores": np.concatenate(list(by_task.values())), "strata": _sizes(by_task)},
    ]


def example_scores(metric: str, run: Path) -> Floats | None:
    """Scores of a run's test examples (examples,); None where the metric is not their mean."""
    column = _COLUMNS.get(metric)
    if column is None:
        return None
    frame = RunFolder(run).table("predictions.parquet", "split", column)
    if frame is None:
        raise UnreadableError(f"{run} has no predictions.parquet. Restore it from a copy, or run it again.")
    return frame.loc[frame["split"] == "test", column].to_numpy(np.float64)


def scores_by_task(run: Path) -> dict[str, Floats]:
    """Whether each test example of each of several tasks was right; empty of a run on one task."""
    frame = RunFolder(run).table("predictions.parquet", "split")
    if frame is None or "task" not in frame or "correct" not in frame:
        return {}
    tested = frame[frame["split"] == "test"]
    return {str(task): own["correct"].to_numpy(np.float64) for task, own in tested.groupby("task", sort=False)}


def _sizes(by_task: Mapping[str, Floats]) -> list[int]:
    return [len(scores) for scores in by_task.values()]


@dataclass(frozen=True)
class Floors:
    """What needs no language model.

    Attributes:
        scores: by split, metric and floor.
        correct: whether each test row is right, by floor, then by task where they are several, else under "".
    """

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    correct: Mapping[str, Mapping[str, Floats]]

    @classmethod
    def of(cls, task: Task) -> Floors:
        """A linear model of word counts, and the commonest label of the training rows."""
        scores: dict[str, dict[str, dict[str, float]]] = {}
        correct: dict[str, dict[str, Floats]] = {}
        for floor, splits in floor_columns(task).items():
            word = {FLOOR: "linear", MAJORITY: "majority"}[floor]
            for split, columns in splits.items():
                for metric, value in metrics_of(task, columns).items():
                    scores.setdefault(split, {}).setdefault(metric, {})[f"floor_{word}"] = value
            if task.metric == "accuracy" and "test" in splits:
                correct[f"floor ({word})"] = _right(task, splits["test"])
        return cls(scores, correct)

    def examples(self, backbone: str, task: str) -> list[dict[str, Any]]:
        """Rows of the table of example scores; a floor is the same for every seed and has none."""
        place = {"backbone": backbone, "task": task, "seed": -1, "split": "test", "metric": "accuracy"}
        rows: list[dict[str, Any]] = []
        for floor, by_task in self.correct.items():
            if "" in by_task:
                rows.append(place | {"method": floor, "scores": by_task[""]})
                continue
            rows += [
                place | {"method": floor, "metric": f"{name}/accuracy", "scores": right}
                for name, right in by_task.items()
            ]
            together = np.concatenate(list(by_task.values()))
            rows.append(place | {"method": floor, "scores": together, "strata": _sizes(by_task)})
        return rows


def _right(task: Task, columns: Columns) -> dict[str, Floats]:
    right = columns["correct"].astype(np.float64)
    return {part.name: right[columns["task"] == part.name] for part in task.parts} if task.parts else {"": right}
