"""What a task is: named splits of raw rows, one shape for every source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella.texts.rows import TaskKind

if TYPE_CHECKING:
    from datasets import Dataset

METRICS: dict[TaskKind, str] = {
    "classification": "accuracy",
    "pair-classification": "accuracy",
    "multiple-choice": "accuracy",
    "regression": "pearson",
    "causal-lm": "perplexity",
    "seq2seq": "rougeL",
}


@dataclass(frozen=True)
class Task:
    """Raw rows of one task, split once and for all.

    Attributes:
        name: as the user named it.
        kind: decides the columns of the rows and the head of the model.
        splits: "train", "validation" and "test", where there is one. Model selection may see validation, never test.
            Columns: classification `text, label` (int); pair-classification `text1, text2, label`;
            regression `text1[, text2], label` (float); multiple-choice `question, choices` (list), `label` (index);
            causal-lm `text`, or `prompt, completion`, or `messages`; seq2seq `source, target`.
        label_names: name of each integer label; empty where there are none.
        metric: the metric a table shows ("accuracy", "matthews", "pearson", "perplexity", "rougeL", "exact_match").
        source: where the rows come from, with version or SHA-256; a sentence for the model card.
        licence: the terms of the rows.
        notes: what loading did: duplicates and overlapping rows dropped, how the rows were split.
    """

    name: str
    kind: TaskKind
    splits: Mapping[str, Dataset]
    label_names: tuple[str, ...]
    metric: str
    source: str
    licence: str
    notes: tuple[str, ...]
