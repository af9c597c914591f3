"""What `lamella.doctor` examines of a run's folder, and the preflight of a run before there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lamella.diagnostics.adapter_folder import CONFIG
from lamella.diagnostics.doctor import examine_adapter, say_without_batches
from lamella.diagnostics.preflight import Preflight, preflight
from lamella.diagnostics.usage import judge_usage
from lamella.diagnostics.weights import examine_numbers, tensors_of
from lamella.errors import LamellaError
from lamella.findings import Diagnosis, Examination
from lamella.lab.data import Encoded, Task, encode, load_backbone
from lamella.lab.methods import trainable_parameters
from lamella.lab.runs.card import public_labels, task_line
from lamella.lab.runs.record import examine_record
from lamella.lab.runs.run import RunResult
from lamella.lab.runs.settings import RunSettings, settings_of
from lamella.lab.runs.tasks import task_of
from lamella.lab.runs.trained import load_trained
from lamella.lab.runs.trainer import total_steps
from lamella.lab.scoring import refuse_longer_rows


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
        model = loaded if loaded is not None else _whole_model(path, settings)
        examine_numbers(tensors_of(model), "model", examination)
    else:
        raise LamellaError(f"{path} holds a run without a result. Let `lamella train` finish it first.")
    if model is None or any(finding.code == "not-finite" for finding in examination.findings):
        return
    uses = examine_record(path, model, settings, examination)
    if uses is None:
        say_without_batches(model, batches, examination)
    else:
        judge_usage(uses, model, "the run's validation rows", examination)


def _whole_model(path: Path, settings: RunSettings) -> nn.Module:
    """The complete model of a run; where its task is gone, with the head that its config names."""
    try:
        task_of(settings)
    except LamellaError:
        return load_backbone(str(path / "model")).model
    return load_trained(path, as_left=False).model


def preflight_of(settings: RunSettings) -> Preflight:
    """The preflight of the run that these settings describe, on its first training rows; nothing is written.

    It says first what the rows are, as a run's log does, and how many parameters would train.

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
    model: Any = settings.method.build(backbone, task).model
    refuse_longer_rows(model, encoded)
    model.to(PartialState().device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    count = len(encoded.train)
    batch = encoded.collator([encoded.train[index] for index in range(min(settings.batch_size, count))])
    steps = total_steps(settings, count, world=1) * settings.accumulation
    found = preflight(model, batch, steps, bf16=settings.bf16)
    about = (*_about_rows(task, encoded), f"{trainable_parameters(model):,} trainable parameters")
    return replace(found, checked=(*about, *found.checked))


def _about_rows(task: Task, encoded: Encoded) -> list[str]:
    """What a run on these rows would say of them: how many each split has, their labels, how they were read and cut."""
    labels = public_labels(task)
    named = [f"labels, in the order of their numbers: {', '.join(labels)}"] if labels else []
    return [f"task: {task_line(task)}", *named, *task.notes, *encoded.notes]
