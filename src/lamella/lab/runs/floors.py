"""What a task's scores have to beat: a linear model on word counts, and the commonest label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError
from lamella.lab.data import Task
from lamella.lab.scoring import Columns, metrics_of

FLOOR = "floor (TF-IDF)"
MAJORITY = "floor (majority)"
_TEXTS = ("text", "text1", "text2")
_MOST_ROWS = 20_000  # up to here the linear model takes seconds
_KINDS = ("classification", "pair-classification", "regression")


def floor_columns(task: Task) -> dict[str, dict[str, Columns]]:
    """What `floor_predictions` says beside the labels, by floor, then by split: columns to take metrics of."""
    return {
        floor: {split: _columns(task, split, predicted) for split, predicted in splits.items()}
        for floor, splits in floor_predictions(task).items()
    }


def floor_scores(task: Task) -> dict[str, float]:
    """The linear model's score in the task's metric, by split; empty where it has none or takes long."""
    if len(task.splits["train"]) > _MOST_ROWS:
        return {}
    columns = floor_columns(task).get(FLOOR, {})
    return {split: metrics_of(task, guessed)[task.metric] for split, guessed in columns.items()}


def floor_predictions(task: Task) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Predictions of the linear model and, for classes, of the commonest one: by floor, then by split.

    Each of several tasks has models of its own. Empty for tasks without labels to predict from a text.
    """
    by_task = [_predictions(part) for part in task.tasks]
    if not all(by_task):
        return {}
    return {
        floor: {
            split: np.concatenate(
                [
                    predicted[floor][split] + task.first_label(part)
                    for part, predicted in zip(task.tasks, by_task, strict=True)
                    if split in predicted[floor]
                ]
            )
            for split in task.splits
            if split != "train"
        }
        for floor in by_task[0]
    }


def _predictions(task: Task) -> dict[str, dict[str, npt.NDArray[Any]]]:
    train = texts_of(task, "train") if "train" in task.splits else None
    if train is None:
        return {}
    regression = task.kind == "regression"
    labels = task.splits["train"]["label"]
    splits = [split for split in ("validation", "test") if split in task.splits]
    texts = [texts_of(task, split) or [] for split in splits]
    predictions = linear_floor(train, labels, [text for part in texts for text in part], regression=regression)
    ends = np.cumsum([len(part) for part in texts])
    floors = {FLOOR: dict(zip(splits, np.split(predictions, ends[:-1]), strict=True))}
    if not regression:
        floors[MAJORITY] = {split: majority_floor(labels, len(task.splits[split])) for split in splits}
    return floors


def _columns(task: Task, split: str, predicted: npt.NDArray[Any]) -> Columns:
    labels = np.asarray(task.splits[split]["label"])
    columns = {"label": labels, "prediction": predicted}
    if task.kind == "regression":
        return columns | {"squared_error": (predicted - labels) ** 2}
    columns["correct"] = predicted == labels
    return columns | ({"task": np.asarray(task.splits[split]["task"])} if task.parts else {})


def texts_of(task: Task, split: str) -> list[str] | None:
    """What is read of each example, the parts of a pair one after the other; None for tasks of other kinds."""
    if task.kind not in _KINDS:
        return None
    rows = task.splits[split]
    columns = [column for column in _TEXTS if column in rows.column_names]
    return [
        " ".join(text for text in texts if text is not None)
        for texts in zip(*(rows[column] for column in columns), strict=True)
    ]


def linear_floor(
    train_texts: Sequence[str], train_labels: npt.ArrayLike, texts: Sequence[str], *, regression: bool = False
) -> npt.NDArray[np.generic]:
    """Predictions (len(texts),) of TF-IDF (words and word pairs, sublinear) with logistic or ridge regression.

    Vocabulary, weights and model are fitted on the training texts alone. A single training class is predicted as is.

    Raises:
        LamellaError: texts and labels differ in number, or there are none.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    labels = np.asarray(train_labels)
    if len(train_texts) != len(labels) or not len(labels):
        raise LamellaError(
            f"The floor was given {len(train_texts)} training texts and {len(labels)} labels; "
            "it needs one label for each text and at least one of them."
        )
    if not regression and len(np.unique(labels)) == 1:
        return majority_floor(labels, len(texts))
    model = Ridge() if regression else LogisticRegression(max_iter=1000, C=10.0)
    # the default token pattern drops one-letter words and empty texts alike; this one keeps every word
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    predictions: npt.NDArray[np.generic] = make_pipeline(vectorizer, model).fit(train_texts, labels).predict(texts)
    return predictions


def majority_floor(train_labels: npt.ArrayLike, count: int) -> npt.NDArray[np.generic]:
    """The commonest training label, ``count`` times."""
    values, counts = np.unique(np.asarray(train_labels), return_counts=True)
    return np.full(count, values[counts.argmax()])
