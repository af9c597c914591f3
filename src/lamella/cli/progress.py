"""How far a training is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Self

from lamella.cli.output import console

_SECONDS_BETWEEN_LINES = 30.0


class Bar(TrainerCallback):
    """Shows the steps of each training that it accompanies, their rate and the time that is left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._began = self._said = 0.0  # time.monotonic
        self._first = 0
        self._loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin at the step that a resumed run starts from."""
        if not state.is_world_process_zero:
            return
        self._began = self._said = time.monotonic()
        self._first, self._loss = state.global_step, ""
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, rate=""
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by a step."""
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        rate = (state.global_step - self._first) / max(now - self._began, 1e-9)  # steps per second
        if self._progress is not None:
            self._progress.update(
                self._task, completed=state.global_step, description=f"training{self._loss}", rate=f"{rate:.2f}/s"
            )
        elif now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            left = (state.max_steps - state.global_step) / rate / 60
            console.print(
                f"step {state.global_step} of {state.max_steps}{self._loss}, {rate:.2f}/s, {left:.1f} minutes left"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss beside the steps."""
        if logs and "loss" in logs:
            self._loss = f", loss {logs['loss']:.3f}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away, however the training ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
