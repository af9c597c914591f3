"""The Trainer of a run: lamella's parameter groups, batch order and scores inside transformers' loop."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from lamella.errors import LamellaError
from lamella.lab.runs.callbacks import RoutingHistory
from lamella.lab.runs.folder import RunFolder, seal
from lamella.lab.runs.settings import RunSettings
from lamella.lab.scoring import Selection, own_logits, score, selection, trains_tokens
from lamella.tuners.optimization import param_groups

if TYPE_CHECKING:
    from datasets import Dataset

    from lamella.lab.data import Encoded, Task

_MEGA_BATCH = 50


class BatchOrder(Sampler[int]):
    """Order of the training rows in an epoch, a function of the seed and the epoch alone, so that a resumed run and
    every process of a parallel one see the same.

    An epoch draws as many rows as there are, each task's share as `task_draws` says: all rows of a task where its share
    is as many, otherwise its rows in turn, in a new order whenever all were drawn.

    With lengths, the shuffled rows are cut into stretches of 50 batches, each stretch is sorted by length, and its
    batches are shuffled again: little padding, and still a new order in every epoch.
    """

    def __init__(
        self,
        counts: Sequence[int],
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        lengths: Sequence[int] | None,
        temperature: float = 1.0,
    ) -> None:
        self._counts, self._count = counts, sum(counts)
        self._temperature = temperature
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch
        self._lengths = lengths

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 100_003 + self._epoch())
        drawn = self._drawn()
        order = [drawn[at] for at in torch.randperm(self._count, generator=generator).tolist()]
        return iter(order if self._lengths is None else self._sorted(order, self._lengths, generator))

    def _drawn(self) -> list[int]:
        """The rows of this epoch, which lie task by task."""
        drawn: list[int] = []
        first = 0
        for task, (count, draws) in enumerate(
            zip(self._counts, task_draws(self._counts, self._temperature), strict=True)
        ):
            drawn += [first + at for at in self._of_task(task, count, draws)]
            first += count
        return drawn

    def _of_task(self, task: int, count: int, draws: int) -> Sequence[int]:
        if draws == count:
            return range(count)
        start = draws * self._epoch()
        rounds = range(start // count, (start + draws - 1) // count + 1) if draws else range(0)
        turns = [at for number in rounds for at in self._turn(task, number, count)]
        return turns[start % count :][:draws]

    def _turn(self, task: int, number: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed((self._seed * 100_003 + number) * 1_009 + task)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _sorted(self, order: list[int], lengths: Sequence[int], generator: torch.Generator) -> list[int]:
        stretch, size = _MEGA_BATCH * self._batch_size, self._batch_size
        result: list[int] = []
        for start in range(0, self._count, stretch):
            rows = sorted(order[start : start + stretch], key=lambda i: lengths[i])
            batches = [rows[at : at + size] for at in range(0, len(rows), size)]
            # a short batch stays last, or the ones after it would straddle two of these
            short = batches.pop() if len(batches[-1]) < size else []
            for index in torch.randperm(len(batches), generator=generator).tolist():
                result += batches[index]
            result += short
        return result


def task_draws(counts: Sequence[int], temperature: float) -> list[int]:
    """How many rows of each task an epoch draws: shares in proportion to rows ** (1 / temperature), sum as the rows.

    Source: temperature-scaled mixing of Raffel et al., Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer, 2020, §3.5.2.
    """
    largest = max(counts)
    sizes = [(count / largest) ** (1.0 / temperature) for count in counts]
    ends = [round(sum(counts) * sum(sizes[: at + 1]) / sum(sizes)) for at in range(len(counts))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class RunTrainer(Trainer):
    """transformers' Trainer, which scores with the task's metrics and stops at a loss that is not finite."""

    model_accepts_loss_kwargs: bool
    optimizer: Any
    control: TrainerControl

    def __init__(
        self,
        settings: RunSettings,
        task: Task,
        model: nn.Module,
        rows: Dataset,
        encoded: Encoded,
        folder: RunFolder,
        callbacks: Sequence[TrainerCallback],
        log_sources: Sequence[Callable[[], dict[str, float]]],
        history: RoutingHistory,
    ) -> None:
        self.history = history
        self.settings, self.task, self._collator = settings, task, encoded.collator
        self._log_sources = log_sources
        self._groups(model)  # rates that do not fit the model are an error now, and not after the folder is begun
        super().__init__(
            model=model,
            args=arguments(settings, folder, len(rows), selection(task)),
            train_dataset=rows,
            eval_dataset=encoded.validation,
            data_collator=encoded.collator,
            callbacks=list(callbacks),
        )
        # a Trainer takes any model whose forward has **kwargs to divide its loss by the labels of the whole step, but
        # heads and encoder-decoders return the mean of a batch: with accumulation their gradient would be many times
        # too large
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and trains_tokens(task, model)
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self._refuse_missing_sharding()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over lamella's parameter groups."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self._groups(self.model if model is None else model))
        return self.optimizer

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        chosen = self.settings
        return param_groups(model, chosen.lr, chosen.router_lr, chosen.weight_decay, chosen.router_weight_decay)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; with a head for each of several tasks, that of each row's own head, mean over the rows."""
        if not self.task.heads:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = nn.functional.cross_entropy(own_logits(outputs.logits, labels, self.task.heads).float(), labels)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            LamellaError: the loss is not finite. The weights are still those of the step before.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise LamellaError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1} with lr={self.settings.lr:g}. "
                "The weights are those of the step before. Lower lr, raise warmup_ratio, lower max_grad_norm, or "
                "switch bf16 off, and check the rows for empty texts."
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save one checkpoint; what lies beside it is written before, and its digests when all processes have written.

        Raises:
            LamellaError: it could not be written, on a full disk as a rule.
        """
        try:
            self.history.on_save(self.args, self.state, self.control)
            super()._save_checkpoint(model, trial)
            PartialState().wait_for_everyone()
            if self.is_world_process_zero():
                seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own word for a full disk
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise LamellaError(
                f"The checkpoint of step {self.state.global_step} could not be written: {reason}. Make room in "
                f"{self.args.output_dir}, and the same command goes on from the checkpoint before it."
            ) from error

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The task's metrics on validation, logged and told to the callbacks."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        scores = score(self.model, self.task, rows, self._collator, self.settings.eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the run's callbacks measured, so that every listener (TensorBoard, W&B, ...) gets it."""
        for source in self._log_sources:
            logs.update(source())
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> BatchOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = rows["length"] if self.settings.length_sorted else None
        size = self.settings.batch_size * self.settings.accumulation
        counts = list(Counter(rows["task"]).values())
        temperature = self.settings.task_temperature
        return BatchOrder(counts, size, self.settings.seed, lambda: int(self.state.epoch or 0), lengths, temperature)

    def _refuse_missing_sharding(self) -> None:
        # accelerate silently ignores the wish where there is no accelerator to shard over
        wished = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
        if wished and not self.is_fsdp_enabled:
            raise LamellaError(
                "Sharded training (FSDP) was asked for, and accelerate would run without it on this machine "
                f"({self.accelerator.distributed_type}). Launch without FSDP, or on GPUs."
            )


def total_steps(settings: RunSettings, rows: int, world: int) -> int:
    """Optimizer steps of a run over ``rows`` training rows in ``world`` processes."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(rows / (settings.batch_size * world))
    return math.ceil((settings.epochs or 1.0) * max(1, math.ceil(batches / settings.accumulation)))


def arguments(settings: RunSettings, folder: RunFolder, rows: int, selects: Selection) -> TrainingArguments:
    """The Trainer's settings for a run."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    every = settings.evaluate_every or max(1, math.ceil(total_steps(settings, rows, world) / 4))
    best = settings.keep == "best"
    # the other form loses the gradients of frozen inputs
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if not settings.gradient_checkpointing:
        checkpointing = {}
    if "tensorboard" in settings.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tracking"))
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=settings.epochs or 1.0,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=PartialState().device.type == "cpu",
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the best and the last
        metric_for_best_model=selects.name if best else None,
        greater_is_better=selects.greater_is_better if best else None,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # such a loss ends the run in `training_step`
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **checkpointing,
    )
