"""One run, from settings to a finished folder: `train`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed

from lamella.adapters.card import CARD
from lamella.diagnostics.preflight import FirstStep, peak_memory, reset_peak_memory
from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.lab.data import Backbone, Encoded, Task, encode, load_backbone
from lamella.lab.lora_cards import adapted_by_lora, measure_card
from lamella.lab.methods import trainable_parameters
from lamella.lab.methods.compositions import ComposingMethod
from lamella.lab.runs.by_task import BY_TASK, scores_of, traced_scores
from lamella.lab.runs.callbacks import LogLines, RoutingHistory, Steps, Stopwatch, routing_summary
from lamella.lab.runs.card import model_card
from lamella.lab.runs.controls import has_controls, measure_controls
from lamella.lab.runs.floors import floor_scores
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.plain_text import PlainText
from lamella.lab.runs.rows import Rows, check_unchanged
from lamella.lab.runs.saving import check_saved, go_on_from, load_weights, save_trained
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.tasks import task_of
from lamella.lab.runs.trainer import RunTrainer
from lamella.lab.scoring import Scores, refuse_longer_rows, selection
from lamella.progress import working
from lamella.tuners.model import RoutedModel
from lamella.tuners.optimization import is_routed
from lamella.tuners.redundancy import lora_experts, redundancy

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("lamella")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what `metrics.json` in it says, and its model as it loads from the folder.

    The model is None in the processes that did not write.
    """

    folder: RunFolder
    metrics: dict[str, Any]
    model: PreTrainedModel | PeftModel | None = None


def train(
    settings: RunSettings,
    folder: str | Path,
    *,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    score_test: bool = True,
    controls: bool = False,
) -> RunResult:
    """Train, score, save and check one run; go on from its last checkpoint where it was interrupted.

    Under ``torchrun`` or ``accelerate launch`` the processes share the batches and the scoring, and the first of them
    writes.

    Args:
        settings: the run.
        folder: where its files go; made if it does not exist.
        force: delete an earlier run in ``folder`` first.
        callbacks: further callbacks of transformers' Trainer.
        score_test: whether test rows are scored; not where settings are still to be chosen.
        controls: whether of a composition the mean of its LoRAs and each LoRA alone are scored too, a pass for each; a
            study has runs of their own for them.

    Raises:
        LamellaError: the folder may not be written or another process writes it, settings do not fit the model or
            task, the loss is not finite, a checkpoint cannot be written, or what was saved does not load equal.
    """
    process = PartialState(cpu=not torch.accelerator.is_available())  # else processes on CPUs do not find each other
    place = RunFolder(Path(folder))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    writes = process.is_main_process
    if writes and place.path.is_dir():
        with place.claimed():
            place.check(settings, force=force)
    reset_peak_memory()
    # settings that do not fit end here, before anything is written
    run = _Run(settings, place, process, callbacks, score_test=score_test, controls=controls)
    with place.claimed() if writes else nullcontext():
        if writes:
            place.check(settings, force=force)  # another process may have been here in the meantime
            place.begin(settings, force=force)
            run.keep_rows()
        process.wait_for_everyone()
        with _log_file(place, writes=writes):
            try:
                return run.complete()
            except Exception as error:
                logger.info("stopped: %s", error, exc_info=not isinstance(error, LamellaError))
                raise


class _Run:
    """A run under way: what it was made from, its Trainer and its watch."""

    def __init__(
        self,
        settings: RunSettings,
        place: RunFolder,
        process: PartialState,
        callbacks: Sequence[TrainerCallback],
        *,
        score_test: bool,
        controls: bool,
    ) -> None:
        self.controls = controls and has_controls(settings.method)
        self.settings, self.place, self.process = settings, place, process
        set_seed(settings.seed)
        with process.main_process_first():  # one process fills the cache, the others find it full
            self.task: Task = task_of(settings) if score_test else _without_test(task_of(settings))
            self.backbone: Backbone = load_backbone(settings.model, self.task)
        self.encoded = encode(
            self.task,
            self.backbone.tokenizer,
            max_length=settings.max_length,
            packing=settings.packing,
            decoder=self.backbone.decoder,
        )
        text = settings.plain_text
        self.plain = None if text is None or not score_test else PlainText(settings, text, self.backbone)
        self.rows, self.row_digests = _training_rows(self.encoded, self.task), Rows.of(self.task)
        if not settings.method.resumes and settings.keep == "best":
            raise LamellaError(
                f"'{settings.method.name}' cannot go back to its best checkpoint: PEFT's lack what it trains. "
                "Set keep=last."
            )
        started = time.perf_counter()
        with working(f"building {settings.method.name}"):
            self.built = settings.method.build(self.backbone, self.task)
        self.build_seconds = time.perf_counter() - started
        self.model: nn.Module = self.built.model
        if settings.start is not None:
            go_on_from(self.model, settings.method, Path(settings.start))
        refuse_longer_rows(self.model, self.encoded)
        self.watch, routing = Stopwatch(), RoutingHistory(self.model, place.path / "routing.parquet")
        self.trainer: RunTrainer | None = None  # a method that is done when it is built has nothing to train
        if trainable_parameters(self.model):
            self.trainer = RunTrainer(
                settings,
                self.task,
                self.model,
                self.rows,
                self.encoded,
                place,
                callbacks=[self.watch, routing, LogLines(), FirstStep(), *callbacks],
                log_sources=[self.watch.latest, routing.latest],
                history=routing,
            )

    def keep_rows(self) -> None:
        """Write down which rows there are, by their digests.

        Raises:
            LamellaError: the run was interrupted and began with others.
        """
        if self.place.interrupted:
            check_unchanged(self.place.path, self.task, self.row_digests)
        self.row_digests.save(self.place.path)

    def complete(self) -> RunResult:
        """Train and measure; the last thing written is `metrics.json`."""
        self._log_start()
        better = selection(self.task)
        before = self._scores() if better.name == "perplexity" else {}
        alpha = self._learned_alpha()
        if self.plain is not None:
            self.plain.measure_base(self.model)
        if self.trainer is None:
            self.model.to(self.process.device)
        else:
            self._fit(self.trainer)
            # accelerate wraps the forward for mixed precision; what is scored and saved is the model without it
            self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_fp32_wrapper=False)
        after, routing = self._traced_scores()
        controls = self._measure_controls(after) if self.controls else {}
        metrics = {
            "model": self.settings.model,
            "task": self.task.name,
            "labels": list(self.task.label_names),
            "method": self.settings.method.name,
            "seed": self.settings.seed,
            "metric": better.name,
            "greater_is_better": better.greater_is_better,
            **{split: scores.metrics for split, scores in after.items()},
            **({"before": {split: scores.metrics for split, scores in before.items()}} if before else {}),
            **({} if self.plain is None else {"plain_text": self.plain.measured(self.model)}),
            **({"controls": controls} if controls else {}),
            **self._costs(),
            **({"alpha": {"start": alpha, "end": self._learned_alpha()}} if alpha else {}),
            "routing": routing,
            "rows": self.row_digests.names(),
            "settings": self.settings.digest,
            "notes": [*self.task.notes, *self.encoded.notes],
        }
        loaded = self._write(after, metrics) if self.process.is_main_process else None
        self.process.wait_for_everyone()
        return RunResult(self.place, self.place.metrics(), loaded)

    def _fit(self, trainer: RunTrainer) -> None:
        with self.process.main_process_first():  # the first one also removes what a kill left half-written
            checkpoint = self.place.last_checkpoint()
        with working("training", unit="steps") as work:
            trainer.add_callback(Steps(work))
            self._train(trainer, checkpoint)
        best = trainer.state.best_global_step
        if best and best != trainer.state.global_step:
            logger.info("going back to the weights of step %d, the best on validation", best)
            load_weights(self.model, self.place.checkpoints / f"checkpoint-{best}")

    def _train(self, trainer: RunTrainer, checkpoint: Path | None) -> None:
        if checkpoint is None or not self.settings.method.resumes:
            trainer.train()
        else:
            logger.info("resuming from %s", checkpoint.name)
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step < state.max_steps:
                trainer.train(resume_from_checkpoint=str(checkpoint))
            else:  # it was interrupted while scoring or saving
                load_weights(self.model, checkpoint)
                trainer.state = state
                self.watch.resume(state)

    def _scored_splits(self) -> dict[str, Dataset]:
        splits = {"validation": self.encoded.validation, "test": self.encoded.test}
        return {name: rows for name, rows in splits.items() if rows is not None}

    def _scores(self) -> dict[str, Scores]:
        rows, size = self._scored_splits(), self.settings.eval_batch_size
        return scores_of(self.model, self.task, rows, self.encoded.collator, size)

    def _traced_scores(self) -> tuple[dict[str, Scores], dict[str, float] | None]:
        """The final scores, and the routing over the same rows, which `trace.parquet` keeps; None without routers."""
        if not is_routed(self.model):
            return self._scores(), None
        rows, size = self._scored_splits(), self.settings.eval_batch_size
        traced = traced_scores(self.model, self.task, rows, self.encoded.collator, size)
        if self.process.is_main_process:
            traced.trace.save(self.place.path / "trace.parquet")
            if traced.by_task is not None:
                with atomic(self.place.path / BY_TASK) as path:
                    traced.by_task.to_parquet(path)
        return traced.scores, routing_summary(traced.trace.frame)

    def _measure_controls(self, scores: dict[str, Scores]) -> dict[str, Any]:
        method, model = self.settings.method, self.model
        assert isinstance(method, ComposingMethod)  # `has_controls`
        assert isinstance(model, PeftModel)
        return measure_controls(model, method.adapters, scores, self._scores)

    def _learned_alpha(self) -> dict[str, float]:
        """Learned alphas as they are now, by block or stack; empty where none is learned."""
        tuner = getattr(self.model, "base_model", None)
        return tuner.alphas() if isinstance(tuner, RoutedModel) else {}

    def _costs(self) -> dict[str, Any]:
        state = TrainerState() if self.trainer is None else self.trainer.state
        tuner = getattr(self.model, "base_model", None)
        summary = tuner.summary() if isinstance(tuner, RoutedModel) else None
        return {
            "trainable_parameters": trainable_parameters(self.model),
            **self.built.decided,
            "summary": None if summary is None else str(summary),
            "steps": state.global_step,
            "kept_step": state.best_global_step or state.global_step,
            "build_seconds": self.build_seconds,
            "train_seconds": self.watch.seconds,
            "seconds_per_step": self.watch.seconds / max(1, state.global_step),
            "tokens": int(state.num_input_tokens_seen),
            "peak_memory_bytes": peak_memory(),
            "processes": self.process.num_processes,
        }

    def _write(self, scores: dict[str, Scores], metrics: dict[str, Any]) -> PreTrainedModel | PeftModel:
        """Write the run's files; returns the model as it loads from them."""
        frames = [pd.DataFrame({"split": name, **one.columns}) for name, one in scores.items()]
        if frames:
            with atomic(self.place.path / "predictions.parquet") as path:
                pd.concat(frames, ignore_index=True).to_parquet(path)
        if floor := floor_scores(self.task):
            metrics = metrics | {"floor": floor}
        card = model_card(self.model, self.backbone, self.task, self.settings, metrics)
        save_trained(self.model, self.settings.method, self.backbone, self.place, card)
        batch = self.encoded.collator([self.rows[i] for i in range(min(4, len(self.rows)))])
        method = self.settings.method
        equal, loaded = check_saved(self.model, method, self.place, self.settings.model, self.task, batch)
        if self.trainer is not None and (modules := adapted_by_lora(loaded)):
            self._write_card(loaded, modules)
        if lora_experts(loaded):
            with atomic(self.place.path / "redundancy.parquet") as path:
                redundancy(loaded).to_parquet(path)
        self.place.finish(metrics | {"saved_equals_loaded": equal})
        self.place.remove_checkpoints()
        logger.info("finished")
        return loaded

    def _write_card(self, loaded: PeftModel, modules: Sequence[str]) -> None:
        """Write what a library retrieves a LoRA by, beside it; say so where the base cannot be read."""
        named, rows, collator = {name: name for name in modules}, self.rows, self.encoded.collator
        try:
            with loaded.disable_adapter():
                base = loaded.get_base_model()
                card = measure_card(base, named, self.task, rows, collator, self.backbone.published, logger.info)
        except LamellaError as error:
            logger.info("no %s was written: %s", CARD, error)
            return
        card.save(self.place.path / "adapter")

    def _log_start(self) -> None:
        trained = trainable_parameters(self.model)
        logger.info(
            "%s on %s with %s, seed %d: %s trainable parameters, %d process(es)",
            self.settings.model,
            self.task.name,
            self.settings.method.name,
            self.settings.seed,
            f"{trained:,}",
            self.process.num_processes,
        )
        for note in (*self.task.notes, *self.encoded.notes):
            logger.info("%s", note)


def _without_test(task: Task) -> Task:
    return task.of_each(lambda part: {name: rows for name, rows in part.splits.items() if name != "test"})


def _training_rows(encoded: Encoded, task: Task) -> Dataset:
    if encoded.train is None:
        raise LamellaError(f"The task '{task.name}' has no training rows. Give a task with a train split.")
    if encoded.validation is None:
        raise LamellaError(
            f"The task '{task.name}' has no validation rows to watch the training by. Give it a validation split."
        )
    return encoded.train


class _RunLog(logging.FileHandler):
    """A line that cannot be written is left out: of a full disk the run itself tells, in one sentence."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


@contextmanager
def _log_file(place: RunFolder, *, writes: bool) -> Iterator[None]:
    """lamella's log goes to `log.txt` as well, in the one process that writes."""
    if not writes:
        yield
        return
    handler = _RunLog(place.path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        with suppress(OSError):  # of a full disk the run itself has told
            handler.close()
