"""What a task is: named splits of raw rows, one shape for every source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        parts: the tasks that one model learns side by side, each with its own labels; empty where the task is one. Its
            splits are theirs one after the other, with all their columns and ``task``, the part's name; its labels are
            theirs too, so that one linear head holds a head for each part.
        heads: of each label, the number of the part that it belongs to; empty where the task is one.
    """

    name: str
    kind: TaskKind
    splits: Mapping[str, Dataset]
    label_names: tuple[str, ...]
    metric: str
    source: str
    licence: str
    notes: tuple[str, ...]
    parts: tuple[Task, ...] = ()
    heads: tuple[int, ...] = ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What is encoded and scored by itself: the parts, or the task where it is one."""
        return self.parts or (self,)

    def first_label(self, part: Task) -> int:
        """The number that a part's label 0 has in the whole task."""
        return self.label_names.index(label_of(part, 0)) if self.parts and part.label_names else 0

    def of_each(self, change: Callable[[Task], Mapping[str, Dataset]]) -> Task:
        """The task with other splits of each of its parts; parts that keep none are left out."""
        if not self.parts:
            return replace(self, splits=change(self))
        changed = [replace(part, splits=change(part)) for part in self.parts]
        return self.of_parts([part for part in changed if part.splits])

    def of_parts(self, parts: Sequence[Task]) -> Task:
        """The task with these parts, whose labels are among its own."""
        names = [split for split in ("train", "validation", "test") if any(split in part.splits for part in parts)]
        splits = {split: self._joined(split, parts) for split in names}
        return replace(self, parts=tuple(parts), splits=splits)

    def _joined(self, split: str, parts: Sequence[Task]) -> Dataset:
        from datasets import Dataset

        rows = [
            {"task": part.name, **row, **({"label": row["label"] + self.first_label(part)} if "label" in row else {})}
            for part in parts
            if split in part.splits
            for row in map(dict, part.splits[split])
        ]
        columns = dict.fromkeys(column for row in rows for column in row)
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})


def label_of(part: Task, label: int) -> str:
    """What a label of a part is called among those of all parts."""
    return f"{part.name}/{part.label_names[label]}"
