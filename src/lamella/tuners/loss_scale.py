"""The scale of the task loss for trainers that build it outside the model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lamella.routing import find_tracker


class LossScaleCallback(TrainerCallback):
    """Tells the attached balance loss how the trainer scales a loss that it builds from logits.

    For trainers such as TRL's DPO, KTO and GRPO, which never use ``outputs.loss``: their loss is divided by the
    accumulation steps and, under fp16, multiplied by the gradient scaler's scale. Where a model returns its own loss
    and the trainer uses it, that loss's gradient says more and is preferred.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set(kwargs["model"], self._scaler(kwargs.get("optimizer")) / args.gradient_accumulation_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set(kwargs["model"], None)

    @staticmethod
    def _scaler(optimizer: Any) -> float:
        scaler = getattr(optimizer, "scaler", None)  # accelerate's optimizer knows its gradient scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    @staticmethod
    def _set(model: nn.Module, scale: float | None) -> None:
        tracker = find_tracker(model)
        if tracker is not None:
            tracker.scale = scale
