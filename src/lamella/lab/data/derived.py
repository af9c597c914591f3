"""Tasks made of other tasks: fewer training rows, the union of several, and rows that nothing was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lamella.errors import LamellaError
from lamella.lab.data.splitting import Splits, build_task, sample_rows, split_whole
from lamella.lab.data.task import Task
from lamella.texts.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset

_PROSE, _PROMPTED = ("text",), ("completion", "prompt")
_WATCHED = 5  # of the rows that nothing was trained on, one in so many is left to watch a training by


def fewer(name: str, task: Task, rows: int, watched: int | None = None) -> Task:
    """The task with at most ``rows`` training rows, and ``watched`` validation rows: those that ``limit`` leaves.

    Raises:
        LamellaError: no row would be left, or there are no validation rows.
    """
    counts = {"train": rows} | ({} if watched is None else {"validation": watched})
    for split, count in counts.items():
        if count < 1:
            raise LamellaError(f"{name} asks for {count} {split} rows. Ask for at least one.")
        if split not in task.splits:
            raise LamellaError(f"{name} asks for {split} rows, and {task.name} has {', '.join(task.splits)} rows.")
    fewer_rows = {split: sample_rows(task.splits[split], count) for split, count in counts.items()}
    return replace(task, name=name, splits={**task.splits, **fewer_rows})


def union(name: str, tasks: Sequence[Task], seed: int) -> Task:
    """The rows of several tasks, split by split; training rows that one of them evaluates on are dropped.

    Prose joins rows with prompts as completions of no prompt, which are the same tokens.

    Raises:
        LamellaError: they differ in kind, columns or labels.
    """
    if {tuple(_columns(task)) for task in tasks} == {_PROSE, _PROMPTED}:
        tasks = [_prompted(task) if tuple(_columns(task)) == _PROSE else task for task in tasks]
    first = tasks[0]
    for task in tasks[1:]:
        for what, one, other in (
            ("kind", first.kind, task.kind),
            ("labels", first.label_names, task.label_names),
            ("columns", _columns(first), _columns(task)),
        ):
            if one != other:
                raise LamellaError(
                    f"{name} joins tasks of different {what}: {first.name} has {one}, {task.name} {other}. Join tasks "
                    "that one head can serve."
                )
    splits: Splits = {
        split: [row for task in tasks for row in _rows(task.splits[split])]
        for split in first.splits
        if all(split in task.splits for task in tasks)
    }
    return build_task(
        name,
        first.kind,
        splits,
        label_names=first.label_names,
        metric=first.metric,
        source="; ".join(dict.fromkeys(task.source for task in tasks)),
        licence="; ".join(dict.fromkeys(task.licence for task in tasks)),
        notes=[f"{task.name}: {note}" for task in tasks for note in task.notes],
        seed=seed,
    )


def held(name: str, task: Task, seed: int) -> Task:
    """The validation rows of a task as a small task without a test.

    What is fitted to models that were trained on the task's training rows is fitted on these.

    Raises:
        LamellaError: there are too few.
    """
    rows = _rows(task.splits["validation"]) if "validation" in task.splits else []
    if len(rows) < _WATCHED:
        raise LamellaError(f"{name} divides the validation rows of {task.name}, which has {len(rows)}. It needs more.")
    group = _asked if "prompt" in rows[0] else None
    splits, notes = split_whole(task.kind, rows, test=0, validation=len(rows) // _WATCHED, group=group)
    return build_task(
        name,
        task.kind,
        splits,
        label_names=task.label_names,
        metric=task.metric,
        source=task.source,
        licence=task.licence,
        notes=[*task.notes, "only its validation rows are used", *notes],
        seed=seed,
    )


def _prompted(task: Task) -> Task:
    """Prose as completions without a prompt."""
    return replace(
        task,
        splits={
            name: split.rename_column("text", "completion").add_column("prompt", [""] * len(split))
            for name, split in task.splits.items()
        },
    )


def _asked(row: Row) -> str:
    """What must stay in one split: a prompt, or the text where nothing is asked."""
    return str(row["prompt"] or row["completion"])


def _rows(split: Dataset) -> list[Row]:
    return [dict(row) for row in split]


def _columns(task: Task) -> list[str]:
    return sorted(next(iter(task.splits.values())).column_names)
