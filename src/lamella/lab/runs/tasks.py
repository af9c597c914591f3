"""The task of a run, with as many rows as its settings allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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

    Raises:
        LamellaError: a split that the task does not have.
    """
    if limit is None:
        return task
    counts: Mapping[Any, int] = dict.fromkeys(task.splits, limit) if isinstance(limit, int) else limit
    if missing := [split for split in counts if split not in task.splits]:
        raise LamellaError(f"limit names the split '{missing[0]}', but {task.name} has {', '.join(task.splits)}.")
    splits = dict(task.splits)
    for name, count in counts.items():
        splits[name] = sample_rows(splits[name], count)
    return replace(task, splits=splits)
