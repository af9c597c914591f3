"""The task of a run, with as many rows as its settings allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lamella.errors import LamellaError
from lamella.lab.data import Task, load_task
from lamella.lab.data.splitting import sample_rows
from lamella.lab.runs.settings import RunSettings


def task_of(settings: RunSettings) -> Task:
    """The task that a run with these settings learns and is scored on."""
    return limited(load_task(settings.task), settings.limit)


def limited(task: Task, limit: int | Mapping[Any, int] | None) -> Task:
    """The task with at most ``limit`` rows of every split, or of each split that it names; always the same rows.

    Of several tasks each has so many.

    Raises:
        LamellaError: a split that the task does not have.
    """
    if limit is None:
        return task
    counts: Mapping[Any, int] = dict.fromkeys(task.splits, limit) if isinstance(limit, int) else limit
    if missing := [split for split in counts if split not in task.splits]:
        raise LamellaError(f"limit names the split '{missing[0]}', but {task.name} has {', '.join(task.splits)}.")
    return task.of_each(
        lambda part: {
            name: sample_rows(rows, counts[name]) if name in counts else rows for name, rows in part.splits.items()
        }
    )


def rows_used(task: Task, split: str, count: int | None = None) -> Task:
    """The task with this split alone, and at most ``count`` rows of it, always the same ones; of several tasks each
    gives its share of the number.
    """
    share = None if count is None else math.ceil(count / len(task.tasks))
    only = task.of_each(lambda part: {name: rows for name, rows in part.splits.items() if name == split})
    return limited(only, share)
