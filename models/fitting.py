"""A model trained on rows of tensors, by transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import ProgressCallback

from lamella.lab.runs.callbacks import Steps
from lamella.progress import working
from models.muon import Muon
from models.settings import Schedule

Columns: TypeAlias = Mapping[str, Tensor]  # what a model's forward takes, each with one entry per row
Curve: TypeAlias = list[dict[str, float]]


def fit(
    model: PreTrainedModel,
    columns: Columns,
    schedule: Schedule,
    *,
    seed: int,
    balance: Callable[[Any, Columns], Tensor] | None = None,
    watch: Callable[[], dict[str, float]] | None = None,
) -> Curve:
    """Train what is trainable on the rows, in an order that the seed decides.

    Args:
        model: returns a loss for these columns; trained in place.
        columns: the rows, ``labels`` among them.
        schedule: rates, batch size and passes.
        seed: of the order, and of what the model draws at random in training.
        balance: what is added to the loss of a batch, from the model's outputs with ``router_logits`` and its inputs.
        watch: measured at each log beside the training loss, such as a perplexity on text that is held out.

    Returns:
        Per log: ``step``, ``loss`` (mean since the last log, without what ``balance`` added) and what ``watch`` gave.
    """
    with tempfile.TemporaryDirectory() as scratch, working("training", unit="steps") as work:
        trainer = _Fitter(
            schedule,
            balance,
            watch,
            model=model,
            args=_arguments(schedule, scratch, seed, use_cache=model.config.use_cache),
            train_dataset=[dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            data_collator=default_data_collator,
            callbacks=[Steps(work)],
        )
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.train()
    return trainer.curve


class _Fitter(Trainer):
    """Adds what the routers pay to the loss, and remembers the loss without it."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        schedule: Schedule,
        balance: Callable[[Any, Columns], Tensor] | None,
        watch: Callable[[], dict[str, float]] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.curve: Curve = []
        self._schedule, self._balance, self._watch = schedule, balance, watch
        self._losses: list[Tensor] = []

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """Muon where the schedule says so, otherwise the Trainer's AdamW."""
        if self.optimizer is None and self._schedule.optimizer == "muon":
            self.optimizer = Muon(self.model, self._schedule.lr, self._schedule.weight_decay)
        return self.optimizer or super().create_optimizer()

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        routed = {"output_router_logits": True} if self._balance else {}
        outputs = model(**inputs, use_cache=False, **routed)
        loss = outputs.loss
        self._losses.append(loss.detach())
        if self._balance:
            loss = loss + self._balance(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Remember the mean loss since the last log."""
        if self._losses:
            entry = {"step": float(self.state.global_step), "loss": torch.stack(self._losses).mean().item()}
            self.curve.append({**entry, **(self._watch() if self._watch else {})})
            self._losses = []
        super().log(logs, start_time)


def _arguments(schedule: Schedule, folder: str, seed: int, *, use_cache: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.lr,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup_ratio,
        weight_decay=schedule.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=schedule.bf16,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=schedule.log_every,
        save_strategy="no",
        report_to="none",
        use_cache=use_cache,  # stays as it is in the model's config, which is saved
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
