"""What a run measures while it trains: routing at logging steps, time, and a log that people can read."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lamella.diagnostics.usage import DEAD_SHARE
from lamella.errors import UnreadableError
from lamella.files import atomic, read_table
from lamella.progress import Work
from lamella.tracing import Trace, record_routing
from lamella.tuners.optimization import is_routed

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("lamella")


def routing_summary(frame: pd.DataFrame) -> dict[str, float]:
    """Numbers that tell a healthy mixture from a collapsed one, from the frame of a trace.

    ``entropy``: nats of a token's probabilities over the experts, mean over routers. ``balance``: E · Σ weight² of
    the experts' mean weights, mean over routers: 1 where all E experts are used alike, E where one does everything.
    ``dead_experts``: how many have less than 5 % of an even share of the weight. ``effective_experts``: by how many
    experts a decision counts, mean over routers; not there in traces of an earlier edition.
    """
    routers = frame.groupby(["stack", "layer", "module"], sort=False)
    balance = routers["mean_weight"].apply(lambda weight: len(weight) * float((weight**2).sum()))
    dead = frame["mean_weight"] * frame["num_experts"] < DEAD_SHARE
    summary = {
        "entropy": float(routers["entropy"].first().mean()),
        "balance": float(balance.mean()),
        "dead_experts": float(dead.sum()),
    }
    if "effective_experts" in frame:
        summary["effective_experts"] = float(routers["effective_experts"].first().mean())
    return summary


class Steps(TrainerCallback):
    """Say how far a training is, and its loss."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin at the step that a resumed training goes on from."""
        self._work.begin(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say the loss."""
        if logs and "loss" in logs:
            self._work.note = f"loss {logs['loss']:.3f}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One more step is done."""
        self._work.reach(state.global_step)


class RoutingHistory(TrainerCallback):
    """Keep the trace of every step that is logged, over the whole training.

    Works with any Trainer: ``Trainer(..., callbacks=[RoutingHistory(model, "routing.parquet")])``. The file holds the
    columns of `Trace.frame` behind ``step``; it is written with every checkpoint and at the end, and a resumed training
    goes on from it. In a process group the counts of all processes are added up, and the first one writes.

    Args:
        model: a model with or without routers; without, nothing is recorded or written.
        path: the Parquet file.
    """

    def __init__(self, model: nn.Module, path: str | Path) -> None:
        self._model = model
        self._path = Path(path)
        self._recording = contextlib.ExitStack()
        self._trace: Trace | None = None
        self._frames: list[pd.DataFrame] = []
        self._summary: dict[str, float] = {}

    def latest(self) -> dict[str, float]:
        """The summary of the step just recorded, once; empty in between."""
        summary, self._summary = self._summary, {}
        return summary

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what an interrupted training recorded before the step it goes on from.

        Raises:
            LamellaError: it is not all there, so that the history would have a gap.
        """
        self._frames = []
        if not state.global_step or not is_routed(self._model):
            return
        logged = set(range(state.logging_steps, state.global_step + 1, state.logging_steps))
        earlier = read_table(self._path, "step") if logged else None
        if earlier is not None:
            if missing := sorted(logged - set(earlier["step"])):
                raise UnreadableError(
                    f"{self._path} lacks step {missing[0]} of the training that is resumed. Restore it from a copy, or "
                    "start the training afresh."
                )
            self._frames.append(earlier[earlier["step"] <= state.global_step])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start recording if this step will be logged."""
        if (state.global_step + 1) % state.logging_steps == 0 and is_routed(self._model):
            self._trace = self._recording.enter_context(record_routing(self._model))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop recording, before anything else runs the model."""
        if self._trace is not None:
            self._recording.close()
            self._trace.gather()
            frame, self._trace = self._trace.frame, None
            frame.insert(0, "step", state.global_step)
            self._frames.append(frame)
            self._summary = {f"routing/{name}": value for name, value in routing_summary(frame).items()}
        if control.should_save:  # before the checkpoint, so that none is ever without its history
            self._write(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what was recorded so far."""
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what was recorded."""
        self._write(state)

    def _write(self, state: TrainerState) -> None:
        import pandas as pd

        if self._frames and state.is_world_process_zero:
            with atomic(self._path) as unfinished:
                pd.concat(self._frames, ignore_index=True).to_parquet(unfinished, index=False)


def entropy_over_training(history: pd.DataFrame) -> pd.DataFrame:
    """One row per step of a `RoutingHistory`: entropy as a share of its maximum ln E, balance and dead experts."""
    import pandas as pd

    rows = []
    for step, frame in history.groupby("step"):
        most = frame.groupby(["stack", "layer", "module"])["num_experts"].first().map(math.log)
        summary = routing_summary(frame)
        rows.append({"step": step, **summary, "entropy": summary["entropy"] / float(most.mean())})
    return pd.DataFrame(rows)


class Stopwatch(TrainerCallback):
    """Seconds spent in training steps, without scoring and saving; a resumed run goes on counting."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def latest(self) -> dict[str, float]:
        """The seconds so far, for the Trainer's log, which every checkpoint keeps."""
        return {"train_seconds": self.seconds}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the count of the run that is resumed."""
        self.resume(state)

    def resume(self, state: TrainerState) -> None:
        """Go on from the seconds that a checkpoint's log holds."""
        self.seconds = next(
            (log["train_seconds"] for log in reversed(state.log_history) if "train_seconds" in log), 0.0
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the watch."""
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the watch."""
        self.seconds += time.perf_counter() - self._started


class LogLines(TrainerCallback):
    """Every log of the Trainer as a line of the run's log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line."""
        if state.is_world_process_zero and logs:
            numbers = " ".join(f"{name}={value:.5g}" for name, value in logs.items() if isinstance(value, int | float))
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, numbers)
