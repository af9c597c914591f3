"""How trainers scale a task loss that they build outside the model, so that an attached balance loss is scaled alike.

The gradient that arrives at a model's own loss says how it was scaled; a loss built from logits says nothing.
transformers' Trainer, and with it every trainer of TRL, builds and scales its loss in ``training_step``: what it
divides by is read there. A loop by hand says it with ``lamella.routing.loss_scale``.
"""

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import Tensor

from lamella.routing import Scale

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """One micro-batch in the hands of transformers' Trainer.

    Attributes:
        trainer: whose it is.
        inputs: the micro-batch as the trainer was given it; how its loss is built may take the labels away later.
        total: the labels of all micro-batches of this optimiser step, by which a loss summed over tokens is divided;
            None where the trainer counts none.
    """

    trainer: "Trainer"
    inputs: Any
    total: Tensor | int | None

    def scale(self, shifts_labels: bool) -> Tensor | float:
        """The micro-batch's weight among those of the optimiser step, times the gradient scaler's scale."""
        scaler = self.trainer.accelerator.scaler
        return self._weight(shifts_labels) * (1.0 if scaler is None else float(scaler.get_scale()))

    def _weight(self, shifts_labels: bool) -> Tensor | float:
        """What ``training_step`` and ``compute_loss`` of transformers make of a mean over the micro-batch.

        Where the trainer scales by itself and counts no labels (TRL's GRPO), all micro-batches weigh the same, as the
        balance losses of native mixtures of experts do there.
        """
        trainer, labels = self.trainer, self._labels(shifts_labels)
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and self.total is not None
            scaled = counted or trainer.compute_loss_func is not None
        if not scaled or labels is None or self.total is None:
            return 1 / trainer.current_gradient_accumulation_steps
        share = labels.ne(-100).sum() / torch.as_tensor(self.total, device=labels.device)
        # Counted over all processes, the loss is multiplied by their number, since their gradients are averaged.
        over_all = trainer.args.average_tokens_across_devices
        return share * (trainer.accelerator.num_processes // trainer.get_tp_size()) if over_all else share

    def _labels(self, shifts_labels: bool) -> Tensor | None:
        """Those that the trainer counts."""
        given = self.inputs if isinstance(self.inputs, Mapping) else {}
        shifted, labels = given.get("shift_labels"), given.get("labels")
        if isinstance(shifted, Tensor):
            return shifted
        if not isinstance(labels, Tensor):
            return None
        return labels[..., 1:] if shifts_labels else labels


_STEP: ContextVar[TrainingStep | None] = ContextVar("lamella_training_step", default=None)


def scale_of_trainer(shifts_labels: bool) -> Scale | None:
    """How a loss is scaled that is built from the outputs of a call that begins now; None where nobody says.

    Args:
        shifts_labels: whether the first label of a row counts for nothing.
    """
    step, accelerate = _STEP.get(), GradientState()
    if step is not None:
        return functools.cache(functools.partial(step.scale, shifts_labels))
    if accelerate.in_dataloader and accelerate.num_steps > 1:
        return lambda: 1 / accelerate.num_steps  # Accelerator.backward, also where the last micro-batches are fewer
    return None


def watch_trainer() -> None:
    """Makes each ``training_step`` of transformers' Trainer known to the calls inside it; the first time alone.

    The Trainer has no hook there: its callbacks are told neither the micro-batch nor how many labels it is divided by.
    """
    try:
        from transformers import Trainer  # slow to load, and of no use to those who only load a model
    except (ImportError, RuntimeError):  # broken packages beside it: it trains nothing here either
        return
    original = Trainer.training_step
    if getattr(original, "tells_lamella", False):  # copied by whoever wraps it in turn
        return

    @functools.wraps(original)
    def training_step(
        trainer: "Trainer", model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Tensor:
        token = _STEP.set(TrainingStep(trainer, inputs, num_items_in_batch))
        try:
            loss: Tensor = original(trainer, model, inputs, num_items_in_batch, **kwargs)
        finally:
            _STEP.reset(token)
        return loss

    training_step.tells_lamella = True  # type: ignore[attr-defined]
    Trainer.training_step = training_step
