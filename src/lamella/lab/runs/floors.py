"""What a task's scores have to beat."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from lamella.lab.data import Task
from lamella.lab.runs.linear_floor import linear_floor, majority_floor

FLOOR = "floor (TF-IDF)"
MAJORITY = "floor (majority)"
_TEXTS = {"classification": ("text",), "pair-classification": ("text1", "text2"), "regression": ("text1", "text2")}


def floor_predictions(task: Task) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Predictions of the linear model and, for classes, of the commonest one: by floor, then by split.

    Empty for tasks without labels to predict from a text.
    """
    train = texts_of(task, "train")
    if train is None:
        return {}
    regression = task.kind == "regression"
    labels = task.splits["train"]["label"]
    splits = [split for split in ("validation", "test") if split in task.splits]
    texts = {split: texts_of(task, split) or [] for split in splits}
    floors = {FLOOR: {split: linear_floor(train, labels, texts[split], regression=regression) for split in splits}}
    if not regression:
        floors[MAJORITY] = {split: majority_floor(labels, len(task.splits[split])) for split in splits}
    return floors


def texts_of(task: Task, split: str) -> list[str] | None:
    """What is read of each example, the parts of a pair one after the other; None for tasks of other kinds."""
    if task.kind not in _TEXTS:
        return None
    rows = task.splits[split]
    columns = [column for column in _TEXTS[task.kind] if column in rows.column_names]
    return [" ".join(texts) for texts in zip(*(rows[column] for column in columns), strict=True)]
