"""What a run measures while it trains: routing at logging steps, time, and a log that people can read."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lamella.tracing import record_routing
from lamella.training.optimization import is_routed

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("lamella")

# an expert with less than this part of an even share does next to nothing
DEAD_SHARE = 0.05


def routing_summary(frame: pd.DataFrame) -> dict[str, float]:
    """Three numbers that tell a healthy mixture from a collapsed one, from the frame of a trace.

    ``entropy``: nats of a token's probabilities over the experts, mean over routers. ``balance``: E · Σ share², mean
    over routers: 1 where all E experts are used alike, E where one does everything. ``dead_experts``: how many have
    less than 5 % of an even share.
    """
    routers = frame.groupby(["stack", "layer", "module"], sort=False)
    balance = routers["share"].apply(lambda share: len(share) * float((share**2).sum()))
    dead = frame["share"] * frame["num_experts"] < DEAD_SHARE
    return {
        "entropy": float(routers["entropy"].first().mean()),
        "balance": float(balance.mean()),
        "dead_experts": float(dead.sum()),
    }


class RoutingLogger(TrainerCallback):
    """Record the routing of every step that is logged; `latest` is what the Trainer adds to that log."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._recording = contextlib.ExitStack()
        self._trace: Any = None
        self._summary: dict[str, float] = {}

    def latest(self) -> dict[str, float]:
        """The summary of the step just recorded, once; empty in between."""
        summary, self._summary = self._summary, {}
        return summary

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
            self._summary = {f"routing/{name}": value for name, value in routing_summary(self._trace.frame).items()}
            self._trace = None


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
