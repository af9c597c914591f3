"""What a run or an adapter folder holds, loaded and ready to be used on a task."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from lamella.diagnostics.adapter_folder import (
    CONFIG,
    SavedAdapter,
    head_size,
    load_base,
)
from lamella.diagnostics.weights import examine_numbers, tensors_of
from lamella.errors import LamellaError, UnreadableError
from lamella.findings import Examination
from lamella.lab.data import Backbone, Encoded, Task, encode, load_backbone, load_task
from lamella.lab.data.models import has_own_head, is_decoder
from lamella.lab.runs.folder import ADDED, RunFolder
from lamella.lab.runs.rows import Seen, seen
from lamella.lab.runs.settings import RunSettings, settings_of
from lamella.lab.runs.tasks import rows_used
from lamella.lab.scoring import trains_tokens
from lamella.tuners.redundancy import lora_experts, redundancy

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

# Kinds that one head can serve; the labels of a classification must be the same as well.
_HEADS = {"classification": "classes", "pair-classification": "classes", "regression": "a value"}


@dataclass(frozen=True)
class Place:
    """Where a trained model lies.

    Attributes:
        folder: of the adapter, or of a complete model.
        settings: of the run that it belongs to; None for an adapter without a run.
    """

    folder: Path
    settings: RunSettings | None

    @property
    def is_adapter(self) -> bool:
        """Whether it needs a base model."""
        return (self.folder / CONFIG).is_file()

    @property
    def label(self) -> str:
        """What to call it: the run's label, or the folder's name."""
        return self.settings.label if self.settings else self.folder.name

    @property
    def base(self) -> str | None:
        """The run's base model, by the name that it has on this machine; None for an adapter without a run."""
        return self.settings.model if self.settings else None

    @property
    def reading(self) -> RunSettings:
        """How rows are read: as in the run, or as by default."""
        return self.settings or RunSettings.parse({})


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, with what reads rows for it."""

    place: Place
    model: Any
    tokenizer: Any
    task: Task

    @property
    def size(self) -> int:
        """Parameters that its training changed: the adapter's and the head's, or all of a complete model."""
        if not isinstance(self.model, PeftModel):
            return int(self.model.num_parameters())
        # runs never resize the vocabulary, and to find out PEFT would ask the hub
        saved = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return sum(tensor.numel() for tensor in saved.values())

    def redundancy(self) -> pd.DataFrame | None:
        """`lamella.redundancy` of the active adapter's LoRA experts; None where it has none."""
        return redundancy(self.model) if lora_experts(self.model) else None

    def rows(self, split: str, count: int | None = None) -> tuple[Dataset, Encoded]:
        """At most ``count`` rows of a split, always the same ones, read as in the run, and their collator.

        Its notes say which of them were trained on, and how the split has changed since the run.

        Raises:
            LamellaError: the task has no such split, or what the run says of its rows cannot be read.
        """
        if split not in self.task.splits:
            raise LamellaError(
                f"The task '{self.task.name}' has no split '{split}'; it has {', '.join(self.task.splits)}."
            )
        reading, task = self.place.reading, rows_used(self.task, split, count)
        encoded = encode(
            task,
            self.tokenizer,
            max_length=reading.max_length,
            packing=reading.packing and task.kind == "causal-lm" and "text" in task.splits[split].column_names,
            decoder=is_decoder(self.model.config),
        )
        rows: Dataset = getattr(encoded, split)
        return rows, dataclasses.replace(encoded, notes=(*self.seen(split, count).notes, *encoded.notes))

    def seen(self, split: str, count: int | None = None) -> Seen:
        """Which of these rows were trained on, so far as that is known."""
        run = None if self.place.settings is None else self.place.folder.parent
        return seen(run, self.place.settings, self.task, split, count)


def redundancy_of(run: Path) -> pd.DataFrame | None:
    """`lamella.redundancy` of a finished run's LoRA experts, as it was saved; None where it has none."""
    if (saved := RunFolder(run).table("redundancy.parquet")) is not None:
        return saved
    # the first edition saved none
    return load_trained(run).redundancy() if (run / "trace.parquet").is_file() else None


def find_trained(path: Path) -> Place:
    """The adapter or model in a run's folder, or the adapter that the folder is.

    Raises:
        LamellaError: there is neither.
    """
    run = path if (path / "run.yaml").is_file() else path.parent
    settings = None
    if (run / "run.yaml").is_file() and (run == path or path.name in ("adapter", "model")):
        settings = settings_of(run)
    folders = [path, path / "adapter"] if run != path else [path / "adapter"]
    for folder in folders:
        if (folder / CONFIG).is_file():
            return Place(folder, settings)
    if settings is not None and (model := run / "model").is_dir():
        return Place(model, settings)
    raise LamellaError(
        f"{path} holds neither an adapter (with {CONFIG}) nor a finished run (with run.yaml and its adapter or model)."
        if path.is_dir()
        else f"There is no folder {path}."
    )


def load_trained(path: Path, task_name: str | None = None, base: str | None = None, *, as_left: bool = True) -> Trained:
    """The model of a run or an adapter, with the head that a task needs.

    Args:
        path: folder of a run, or of an adapter.
        task_name: what it is used on; the run's task when None.
        base: the adapter's base model: a demo model, a hub id or a path; by default the run's, or the one that the
            adapter names.
        as_left: refuse what is not as its run left it.

    Raises:
        LamellaError: nothing to load, or not whole; no task is named anywhere, or the trained head is of another task.
    """
    place = find_trained(path)
    trained_on = load_task(place.settings.task) if place.settings else None
    task = _wanted(task_name, trained_on)
    if task is None:
        raise LamellaError(f"{path} is an adapter without a run and says nothing of its task. Name one with --task.")
    if trained_on is not None:
        _check_labels(trained_on, task)
    if not place.is_adapter:
        if base is not None:
            raise LamellaError(f"{path} holds a complete model, which has no base. Leave --base out.")
        backbone = load_backbone(str(place.folder), task)
        _check_whole(place.folder, backbone)
        if as_left:
            _check_as_left(place)
        return Trained(place, backbone.model.eval(), backbone.tokenizer, task)
    saved = SavedAdapter.read(place.folder)
    backbone = load_backbone(base or _base_of(place, saved), task)
    _check_head(saved, backbone.model, task)
    if place.settings is None:
        return Trained(place, saved.on(backbone.model), backbone.tokenizer, task)
    model = place.settings.method.load(backbone, task, saved.folder).eval()
    if as_left:
        _check_as_left(place)
    return Trained(place, model, backbone.tokenizer, task)


def _wanted(name: str | None, trained_on: Task | None) -> Task | None:
    """The task of that name; of one that the model learned beside others, those with its rows alone."""
    if name is None or trained_on is None:
        return trained_on if name is None else load_task(name)
    own = [part for part in trained_on.parts if part.name == name]
    return dataclasses.replace(trained_on.of_parts(own), name=name) if own else load_task(name)


def load_adapted(path: Path, base: str | None = None) -> PeftModel:
    """The adapter of a folder on its base, for what needs no task.

    Raises:
        LamellaError: there is no adapter, or its base cannot be loaded.
    """
    place = find_trained(path)
    if not place.is_adapter:
        raise LamellaError(f"{path} holds a complete model and no adapter: there are no experts in it.")
    saved = SavedAdapter.read(place.folder)
    model = saved.on(load_base(saved.config, saved.tensors, base or _base_of(place, saved)))
    _check_as_left(place)
    return model


def _base_of(place: Place, saved: SavedAdapter) -> str:
    if place.settings is not None:
        return place.settings.model
    named: str | None = saved.config.base_model_name_or_path
    if not named:
        raise LamellaError(f"{place.folder / CONFIG} names no base model. Give it with --base.")
    return named


def _check_whole(folder: Path, backbone: Backbone) -> None:
    """Whether a complete model had all its tensors on disk, and all of them numbers."""
    if backbone.drawn:
        raise LamellaError(
            f"The model in {folder} is not whole: {len(backbone.drawn)} tensor(s) are missing or of another shape, the "
            f"first {backbone.drawn[0]}, and would be random. Restore it from a copy, or train it again."
        )
    examination = Examination()
    examine_numbers(tensors_of(backbone.model), "model", examination)
    for fault in examination.findings:
        raise LamellaError(f"The model in {folder} cannot be used: {fault.what} ({fault.where}). Train it again.")


def _check_as_left(place: Place) -> None:
    """Whether a run's adapter or model is the one that the run wrote, so far as its digests tell."""
    if place.settings is None:
        return
    run = RunFolder(place.folder.parent)
    expected = place.settings.digest_as_written
    # an earlier edition kept no digest of the settings
    if run.finished and run.metrics(as_left=False).get("settings", expected) != expected:
        raise LamellaError(
            f"{run.path / 'run.yaml'} is not as the run had it, and says how its rows are read. Restore it from a copy."
        )
    try:
        changed = run.changed() or {}
    except UnreadableError:  # nothing to compare with; the doctor says so
        return
    for name, fate in changed.items():
        if name.startswith(f"{place.folder.name}/") and fate != ADDED:
            raise LamellaError(
                f"{place.folder.parent / name} {fate}, and so is no longer the run's. Restore it from a copy, or "
                f"copy {place.folder.name} out of the run to use it as it is now."
            )


def _check_labels(trained_on: Task, task: Task) -> None:
    if _HEADS.get(trained_on.kind) != _HEADS.get(task.kind):
        raise LamellaError(
            f"The model was trained on {trained_on.name}, a {trained_on.kind} task, and its head does not fit "
            f"{task.name}, a {task.kind} task. Choose a task of the same kind."
        )
    if trained_on.label_names != task.label_names:
        raise LamellaError(
            f"The labels differ: the model was trained on {trained_on.name} with {_listed(trained_on.label_names)}, "
            f"and {task.name} has {_listed(task.label_names)}. Choose a task with the same labels in the same order."
        )


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8])
    return f"{len(names)} labels ({shown}{', ...' if len(names) > 8 else ''})" if names else "no labels"


def _check_head(saved: SavedAdapter, base: nn.Module, task: Task) -> None:
    """Whether the adapter's head, where it saved one, has the size that the task needs."""
    size = head_size(saved.tensors)
    if task.kind in _HEADS:
        needed: int | None = 1 if task.kind == "regression" else len(task.label_names)
    else:
        needed = 1 if task.kind == "multiple-choice" and not trains_tokens(task, base) else None
    if size is None and has_own_head(base):
        return  # the base was saved with its head, which the adapter left alone
    if size != needed:
        raise LamellaError(
            f"The adapter has {'no head' if size is None else f'a head with {size} output(s)'}, and {task.name}, a "
            f"{task.kind} task, needs {'none' if needed is None else f'one with {needed}'}. Choose the task it was "
            "trained on, or one with the same labels."
        )
