"""What `lamella.doctor` examines of a run's folder, and the preflight of a run before there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from lamella.diagnostics.adapter_folder import CONFIG
from lamella.diagnostics.doctor import examine_adapter, say_without_batches
from lamella.diagnostics.preflight import Preflight, preflight
from lamella.diagnostics.running import preserve_state
from lamella.diagnostics.usage import judge_usage
from lamella.diagnostics.weights import examine_numbers, tensors_of
from lamella.errors import LamellaError, UnreadableError
from lamella.files import read_table
from lamella.findings import Diagnosis, Examination
from lamella.lab.data import encode, load_backbone
from lamella.lab.data.models import is_decoder
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import RunResult
from lamella.lab.runs.settings import RunSettings, settings_of
from lamella.lab.runs.tasks import task_of
from lamella.lab.runs.trained import find_trained
from lamella.lab.runs.trainer import total_steps
from lamella.lab.scoring import score
from lamella.tracing import COLUMNS, RouterUse, routers_of

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 16
_DIFFERENCE = 1e-3  # in nats or units of the label: far above rounding, far below another model
_ALIKE = 0.9  # part of the rows; a token between two experts may go the other way in another batch


def diagnose(run: RunResult) -> Diagnosis:
    """`lamella.doctor` of a run that was just trained, on its model as it was loaded to check what was saved."""
    examination = Examination()
    examine_run(run.folder.path, None, None, examination, loaded=run.model)
    return examination.diagnosis()


def examine_run(
    path: Path,
    base: nn.Module | str | None,
    batches: list[dict[str, Any]] | None,
    examination: Examination,
    loaded: PreTrainedModel | PeftModel | None = None,
) -> None:
    """Examines the folder of the run's adapter or model, then its record and its trace.

    Args:
        path: of the run.
        base: as `lamella.doctor` was given it.
        batches: as `lamella.doctor` was given them.
        examination: takes the findings.
        loaded: the folder's model where it has been loaded already.

    Raises:
        LamellaError: the run has no result yet.
    """
    settings = settings_of(path)
    examination.saw(f"run: {settings.model} on {settings.task} with {settings.method.name}, seed {settings.seed}")
    model: nn.Module | None
    if (path / "adapter" / CONFIG).is_file():
        adapted = loaded if isinstance(loaded, PeftModel) else None
        model = examine_adapter(path / "adapter", base, settings.model, batches, examination, adapted)
    elif (path / "model").is_dir():
        model = loaded if loaded is not None else load_backbone(str(path / "model")).model
        examine_numbers(tensors_of(model), "model", examination)
    else:
        raise LamellaError(f"{path} holds a run without a result. Let `lamella train` finish it first.")
    if model is None or any(finding.code == "not-finite" for finding in examination.findings):
        return
    examine_record(path, model, settings, examination)
    if (path / "trace.parquet").exists():
        with _readable("trace.parquet", examination):
            judge_usage(_traced(path / "trace.parquet"), model, "the run's validation rows", examination)
    else:
        say_without_batches(model, batches, examination)


@contextmanager
def _readable(name: str, examination: Examination) -> Iterator[None]:
    """What cannot be read is a finding, and the examination goes on."""
    try:
        yield
    except UnreadableError as error:
        examination.error(
            "unreadable",
            str(error),
            name,
            "what the run reports cannot be compared with it",
            "restore it from a copy, or run it again with --force",
        )


def _traced(path: Path) -> list[RouterUse]:
    frame = read_table(path, *COLUMNS)
    try:
        return routers_of(frame)
    except (TypeError, ValueError) as error:
        raise UnreadableError(f"{path} holds no trace: {error}. Restore it from a copy, or make it again.") from error


def examine_record(folder: Path, model: nn.Module, settings: RunSettings, examination: Examination) -> None:
    """Compares the folder's metrics and predictions with the model loaded from it."""
    run = RunFolder(folder)
    if not run.finished:
        examination.saw("the run's record: not examined, the run is not finished")
        return
    try:
        with _readable("predictions.parquet", examination):
            examination.saw(_examine_predictions(folder, model, settings, examination))
    except LamellaError as error:
        examination.saw(f"the run's predictions: not examined. {error}")


def _examine_predictions(folder: Path, model: nn.Module, settings: RunSettings, examination: Examination) -> str:
    path = folder / "predictions.parquet"
    if not path.exists():
        return "the run's predictions: not examined, the run saved none"
    saved = read_table(path, "split")
    task = task_of(settings)
    split = "validation" if "validation" in task.splits else "test"
    encoded = encode(
        replace(task, splits={split: task.splits[split]}),
        AutoTokenizer.from_pretrained(find_trained(folder).folder),
        max_length=settings.max_length,
        packing=settings.packing,
        decoder=is_decoder(model.config),
    )
    rows: Any = getattr(encoded, split)
    rows = rows.select(_first(rows))
    with preserve_state(model):
        columns = score(model, task, rows, encoded.collator, settings.eval_batch_size).columns
    unlike = _unlike(saved[saved["split"] == split], columns)
    if unlike.mean() > 1 - _ALIKE:
        _report(
            f"{int(unlike.sum())} of {len(unlike)} {split} rows are predicted otherwise than in the run",
            examination,
        )
    return f"the run's predictions: {len(unlike)} {split} rows predicted again"


def _first(rows: Dataset) -> list[int]:
    """The first rows; of a question with several options all or none."""
    if "choice" in rows.column_names:
        return [index for index, question in enumerate(rows["row"]) if question < _ROWS // 4]
    return list(range(min(_ROWS, len(rows))))


def _unlike(saved: pd.DataFrame, columns: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    name = "nll" if "nll" in columns else "prediction"
    if len(saved) < len(columns[name]) or name not in saved or saved[name].dtype.kind not in "fiu":
        raise UnreadableError(
            f"predictions.parquet does not hold {len(columns[name])} numbers '{name}', as it did when it was written."
        )
    before = saved[name].to_numpy()[: len(columns[name])]
    return np.abs(before - columns[name]) > _DIFFERENCE * np.maximum(1.0, np.abs(before))


def _report(what: str, examination: Examination) -> None:
    examination.error(
        "saved-unequal",
        what,
        "predictions.parquet",
        "the adapter in the folder is not the model whose scores the folder reports",
        "restore the folder from a copy, or run it again with --force",
    )


def preflight_of(settings: RunSettings) -> Preflight:
    """The preflight of the run that these settings describe, on its first training rows; nothing is written.

    Raises:
        LamellaError: the model, task or method cannot be made.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    task = task_of(settings)
    backbone = load_backbone(settings.model, task)
    encoded = encode(
        task, backbone.tokenizer, max_length=settings.max_length, packing=settings.packing, decoder=backbone.decoder
    )
    if encoded.train is None:
        raise LamellaError(f"The task '{task.name}' has no training rows. Give a task with a train split.")
    model: Any = settings.method.build(backbone, task).model.to(PartialState().device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    count = len(encoded.train)
    batch = encoded.collator([encoded.train[index] for index in range(min(settings.batch_size, count))])
    steps = total_steps(settings, count, world=1) * settings.accumulation
    return preflight(model, batch, steps, bf16=settings.bf16)
