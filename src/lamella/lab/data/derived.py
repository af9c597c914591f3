"""Tasks made of other tasks: fewer training rows, the union of several, several side by side, or one after the other,
and rows that nothing was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lamella.errors import LamellaError
from lamella.lab.data.splitting import Splits, build_task, sample_rows, split_whole, telling_columns
from lamella.lab.data.task import METRICS, Task, label_of
from lamella.texts.rows import Row, TaskKind, input_columns

if TYPE_CHECKING:
    from datasets import Dataset

_PROSE, _PROMPTED = ("text",), ("completion", "prompt")
_CLASSES: tuple[TaskKind, ...] = ("classification", "pair-classification")
_AS_TEXT = "\nWhich of these is it: "
JOINT = "joint:"
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


def parts_of(name: str) -> list[str]:
    """The tasks that a name says are learned side by side; empty where it says no such thing."""
    return [part.strip() for part in name.removeprefix(JOINT).split("+")] if name.startswith(JOINT) else []


def joint(name: str, tasks: Sequence[Task]) -> Task:
    """Several tasks for one model, each with its own labels and scores; how it does is the mean over them.

    Training rows that any of them evaluates on are dropped, whatever they are asked there.

    Raises:
        LamellaError: there is one only, or one twice; or they are of kinds that one model cannot serve.
    """
    names = [task.name for task in tasks]
    if len(tasks) < 2 or len(set(names)) < len(names):
        raise LamellaError(f"{name} has the tasks {', '.join(names)}. Give two or more, and each of them once.")
    kinds = {"classification" if task.kind in _CLASSES else task.kind for task in tasks}
    kind = kinds.pop()
    if kinds or kind == "regression":
        listed = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
        raise LamellaError(
            f"{name} joins {listed}. One model learns classifications and classifications of pairs side by side, or "
            "tasks of one other kind than regression; text:NAME makes a classification a question for a decoder."
        )
    evaluated = {
        _told(task, row) for task in tasks for split in task.splits if split != "train" for row in task.splits[split]
    }
    parts, notes = [], []
    for task in tasks:
        splits = dict(task.splits)
        if "train" in splits:
            kept = [at for at, row in enumerate(splits["train"]) if _told(task, row) not in evaluated]
            if not kept:
                raise LamellaError(f"All training rows of {task.name} are evaluated on by another task of {name}.")
            if dropped := len(splits["train"]) - len(kept):
                splits["train"] = splits["train"].select(kept)
                notes.append(f"{task.name}: {dropped:,} train rows dropped because another of the tasks tests on them")
        parts.append(replace(task, splits=splits))
        notes += [f"{task.name}: {note}" for note in task.notes]
    return Task(
        name=name,
        kind=kind,
        splits={},
        label_names=tuple(label_of(task, label) for task in tasks for label in range(len(task.label_names))),
        metric=METRICS[kind],
        source="; ".join(dict.fromkeys(task.source for task in tasks)),
        licence="; ".join(dict.fromkeys(task.licence for task in tasks)),
        notes=tuple(notes),
        heads=tuple(number for number, task in enumerate(tasks) for _ in task.label_names),
    ).of_parts(parts)


def stage(name: str, task: Task, number: int, rehearsed: int = 0) -> Task:
    """A stage of learning several tasks one after the other: one of them is learnt and watched, all are tested.

    Args:
        name: of the stage.
        task: all of them, as `joint` gives them.
        number: which one is learnt, from 1.
        rehearsed: training rows of each earlier task that are learnt again.

    Raises:
        LamellaError: there is no such task.
    """
    if not 1 <= number <= len(task.parts):
        raise LamellaError(f"{name} learns task {number} of {len(task.parts)}. Give one from 1 to {len(task.parts)}.")
    at = {part.name: index for index, part in enumerate(task.parts, start=1)}

    def splits(part: Task) -> Mapping[str, Dataset]:
        if at[part.name] == number:
            return part.splits
        tested = {split: rows for split, rows in part.splits.items() if split == "test"}
        if at[part.name] < number and rehearsed:
            tested["train"] = sample_rows(part.splits["train"], rehearsed)
        return tested

    return replace(task.of_each(splits), name=name)


def as_text(name: str, task: Task) -> Task:
    """A classification as a question whose options are the names of its labels, as a decoder answers all such tasks.

    A row is what is read, and on a new line "Which of these is it: " with the options. The answer is learned as text,
    and the likeliest option per token is what the model answers.

    Raises:
        LamellaError: it is no classification, or several tasks.
    """
    if task.parts:
        raise LamellaError(f"{name} makes one task a question. Write joint:text:TASK+text:TASK for several.")
    if task.kind not in _CLASSES:
        raise LamellaError(f"{name} makes a classification a question, and {task.name} is a {task.kind} task.")
    options = list(task.label_names)
    asked = f"{_AS_TEXT}{', '.join(options)}?"

    def question(row: Row) -> Row:
        texts = [row[column] for column in input_columns(task.kind, set(row))]
        return {"question": "\n".join(texts) + asked, "choices": options, "label": row["label"]}

    return replace(
        task,
        name=name,
        kind="multiple-choice",
        splits={split: _dataset([question(row) for row in map(dict, rows)]) for split, rows in task.splits.items()},
        label_names=(),
        metric=METRICS["multiple-choice"],
    )


def _told(task: Task, row: Row) -> str:
    """What gives a row away, whatever is asked of it."""
    first, *others = (row[column] for column in telling_columns(task.kind, row))
    return json.dumps([first.partition(_AS_TEXT)[0], *([] if _AS_TEXT in first else others)])


def _dataset(rows: list[Row]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)


def held(name: str, task: Task, seed: int) -> Task:
    """The validation rows of a task as a small task without a test.

    What is fitted to models that were trained on the task's training rows is fitted on these.

    Raises:
        LamellaError: there are too few.
    """
    if task.parts:
        raise LamellaError(f"{name} divides the rows of one task. Write joint:held:TASK+held:TASK for several.")
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
