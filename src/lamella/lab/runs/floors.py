"""What a task's scores have to beat: a linear model on word counts, and the commonest label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lamella.errors import LamellaError
from lamella.lab.data import Task

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
    texts = [texts_of(task, split) or [] for split in splits]
    predictions = linear_floor(train, labels, [text for part in texts for text in part], regression=regression)
    ends = np.cumsum([len(part) for part in texts])
    floors = {FLOOR: dict(zip(splits, np.split(predictions, ends[:-1]), strict=True))}
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
