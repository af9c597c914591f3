"""What commands show: JSON for programs, a progress bar and tables for people."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    import pandas as pd

    from lamella.training.comparison import Comparison

# people read standard error while a program reads standard output
console = Console(stderr=True)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")


def show_comparison(comparison: Comparison) -> None:
    """The results and costs of a comparison as one table, and the answer in words."""
    show_results(comparison.results, comparison.cost, comparison.summary)


def show_results(results: pd.DataFrame, cost: pd.DataFrame, summary: str) -> None:
    """A row per method with its scores and costs, and the answer in words."""
    table = Table(title="test scores, with 95 % intervals", title_justify="left")
    several = results["task"].nunique() > 1
    words = ["method", *["task"] * several, *[name for name in ("difference", "p") if name in results.columns]]
    # a study's seeds are in its report: beside the differences they would be too wide for a terminal
    seeds = [column for column in results.columns if column.startswith("seed ") and len(words) == 1 + several]
    shown = ["method", *["task"] * several, "validation", *seeds, "mean", "interval", *words[1 + several :]]
    for column in [*shown, "trainable", "s/step"]:
        table.add_column(column, justify="left" if column in ("method", "task") else "right", no_wrap=column == "p")
    costs = {row["method"]: row for row in cost.to_dict("records")}
    for row in results.to_dict("records"):
        own = {} if several else costs.get(row["method"], {})
        table.add_row(
            *(_cell(row[column], text=column in words) for column in shown),
            _count(own.get("trainable parameters")),
            _number(own.get("seconds per step")),
        )
    console.print(table)
    console.print(summary, highlight=False)


def _cell(value: Any, *, text: bool) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f}-{value[1]:.3f}"
    if text:
        return value if isinstance(value, str) else ""
    return _number(value)


def _count(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"


def show_run(metrics: Mapping[str, Any], folder: Path) -> None:
    """A run's scores, its size and where it lies."""
    table = Table(title=f"{metrics['method']} on {metrics['task']}", title_justify="left")
    splits = {f"{split} before": scores for split, scores in metrics.get("before", {}).items()}
    splits |= {split: metrics[split] for split in ("validation", "test") if split in metrics}
    table.add_column("split")
    names = list(next(iter(splits.values()), {}))
    for name in names:
        table.add_column(name, justify="right")
    for split, scores in splits.items():
        table.add_row(split, *(_number(scores[name]) for name in names))
    console.print(table)
    if metrics["summary"]:
        console.print(metrics["summary"], highlight=False)
    console.print(
        f"{metrics['trainable_parameters']:,} trainable parameters, {metrics['seconds_per_step']:.2f} s per step, "
        f"{metrics['steps']} steps. Kept in {folder}",
        highlight=False,
    )


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


class Bar(TrainerCallback):
    """A progress bar over the steps of each training that it accompanies."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, at the step a resumed run starts from."""
        if not state.is_world_process_zero:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by a step."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss beside the bar."""
        if self._progress is not None and self._task is not None and logs and "loss" in logs:
            self._progress.update(self._task, description=f"training, loss {logs['loss']:.3f}")

    def close(self) -> None:
        """Take the bar away, however the training ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
