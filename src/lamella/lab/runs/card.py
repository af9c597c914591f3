"""The model card of a run: what was trained on what, how good it is beside a floor, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import nn

from lamella.lab.data import Backbone, Task, is_demo
from lamella.lab.methods import trainable_parameters
from lamella.lab.runs.floors import FLOOR
from lamella.lab.runs.folder import environment
from lamella.lab.runs.settings import RunSettings
from lamella.tuners.model import RoutedModel


def model_card(
    model: nn.Module, backbone: Backbone, task: Task, settings: RunSettings, metrics: Mapping[str, Any]
) -> str:
    """The README.md of what a run saves: Markdown under the YAML block that the hub reads.

    Of a model or a task that lies in a folder of this machine only the folder's name is told.

    Args:
        model: as it is saved.
        backbone: what it was made from.
        task: what it was trained on, with the rows that were used.
        settings: of the run.
        metrics: what the run measured, as in `metrics.json`.
    """
    base, method = public_name(backbone.published), settings.method.name
    sections = {
        "Base": f"{base}. The weights are those of {backbone.source}{_revision(backbone)}.",
        "Method": _method(settings, metrics),
        "Data": _data(task),
        "Scores": _scores(task, metrics),
        "Cost": _cost(model, metrics),
        "Loading": _loading(model, backbone, task),
        **({"Citation": f"The method is that of {paper}."} if (paper := _paper(model)) else {}),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    title = f"{base} on {task_name(task.name)} with {method}"
    return f"---\n{_front_matter(model, base, method)}---\n\n# {title}\n\n{body}\n"


def public_name(name: str) -> str:
    """A model's name without the folders of this machine: a hub id as it is, of a path its last part."""
    path = Path(name)
    return path.name if path.is_absolute() or path.is_dir() else name


def task_name(name: str) -> str:
    """A task's name without the folders of this machine."""
    if made := re.fullmatch(r"(joint|mix|text|held|learn:[\d/]+):(.+)", name):
        how, parts = made.groups()
        return f"{how}:{'+'.join(map(task_name, parts.split('+')))}"
    scheme, colon, rest = name.partition(":")
    return f"{scheme}:{Path(rest).name}" if colon and scheme == "file" else name


def public_labels(task: Task) -> tuple[str, ...]:
    """A task's label names, in the order of its classes; of several tasks' labels, without this machine's folders."""
    return tuple(_public_label(label, task.parts) for label in task.label_names)


def _public_label(label: str, parts: Sequence[Task]) -> str:
    for part in parts:
        if label.startswith(f"{part.name}/"):
            return task_name(part.name) + label.removeprefix(part.name)
    return label


def task_line(task: Task) -> str:
    """A task in a line: its name, its kind and how many rows each split has."""
    rows = ", ".join(f"{len(split):,} {name}" for name, split in task.splits.items())
    return f"{task_name(task.name)} ({task.kind}; rows: {rows})"


def _is_lamella(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, RoutedModel)


def _paper(model: nn.Module) -> str:
    tuner = getattr(model, "base_model", None)
    return tuner.paper if isinstance(tuner, RoutedModel) else ""


def _front_matter(model: nn.Module, base: str, method: str) -> str:
    fields = {
        "base_model": base,
        "library_name": "peft" if isinstance(model, PeftModel) else "transformers",
        "tags": ["lamella", method],
    }
    return str(yaml.safe_dump(fields, sort_keys=False))


def _revision(backbone: Backbone) -> str:
    return f", revision {backbone.revision}" if backbone.revision else ""


def _method(settings: RunSettings, metrics: Mapping[str, Any]) -> str:
    chosen = settings.method.model_dump(mode="json", exclude={"name", "match"}, exclude_none=True)
    chosen |= (
        {"adapters": " ".join(chosen["adapters"])} if "adapters" in chosen else {}
    )  # names, not places on this machine
    chosen |= {"r": metrics["rank"]} if "rank" in metrics else {}
    values = ", ".join(f"{key}={value}" for key, value in chosen.items())
    text = f"{settings.method.name}{f' ({values})' if values else ''}."
    summary = metrics.get("summary")
    return f"{text}\n\n```text\n{summary}\n```" if summary else text


def _data(task: Task) -> str:
    lines = [
        f"Task: {task_line(task)}",
        f"Source: {task.source}",
        f"Licence: {task.licence or 'not stated'}",
        *task.notes,
    ]
    # what a source says of itself is text, and no part of the page that the hub makes of this
    return "\n".join(f"- {escape(line, quote=False)}" for line in lines)


def _scores(task: Task, metrics: Mapping[str, Any]) -> str:
    splits = {split: metrics[split] for split in ("validation", "test") if split in metrics}
    names = list(dict.fromkeys(name for scores in splits.values() for name in scores if "/" not in name))
    floor = metrics.get("floor")
    header = ["split", *names, *[f"{task.metric}, {FLOOR}"] * bool(floor)]
    rows = [
        [split, *(f"{scores[name]:.4f}" for name in names), *([f"{floor[split]:.4f}"] if floor else [])]
        for split, scores in splits.items()
    ]
    table = _table(header, rows)
    if task.parts:
        by_task = [
            [task_name(part.name), *(_number(one.get(f"{part.name}/{task.metric}")) for one in splits.values())]
            for part in task.parts
        ]
        table += f"\n\nOf each task, whose mean is above:\n\n{_table([task.metric, *splits], by_task)}"
    text = f"One run, seed {metrics['seed']}, chosen by {metrics['metric']} on validation."
    if not floor:
        text += " No linear floor was measured."
    return f"{text}\n\n{table}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _cost(model: nn.Module, metrics: Mapping[str, Any]) -> str:
    machine = environment()
    on_gpu = next(model.parameters()).is_cuda
    place = torch.cuda.get_device_name() if on_gpu else f"{machine['threads']} thread(s) of {machine['processor']}"
    return (
        f"{trainable_parameters(model):,} trainable parameters, task head included; {metrics['train_seconds']:.0f} s "
        f"for {metrics['steps']:,} steps ({metrics['tokens']:,} tokens) on {place}."
    )


def _loading(model: nn.Module, backbone: Backbone, task: Task) -> str:
    if not isinstance(model, PeftModel):
        kind = type(model).__name__
        return _code(f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("THIS_FOLDER")')
    bare = model.get_base_model()
    kind, head = type(bare).__name__, _head(task)
    register = ["import lamella  # registers the method with PEFT"] * _is_lamella(model)
    published = _code(
        *register,
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f'base = {kind}.from_pretrained("{public_name(backbone.published)}"{head})',
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
    )
    if not is_demo(backbone.name):
        return published
    ours = _code(
        *register,
        "from peft import PeftModel",
        "from lamella.lab.data import load_backbone, load_task",
        "",
        f'base = load_backbone("{backbone.name}", load_task("{task_name(task.name)}")).model',
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
    )
    if backbone.published == backbone.name:  # nobody else has it
        return ours
    return f"{published}\n\nOn the very weights it was trained on ({backbone.source}):\n\n{ours}"


def _head(task: Task) -> str:
    """What the base's head is made with; the names of the classes stand nowhere else in an adapter's folder."""
    if task.kind == "regression":
        return ", num_labels=1"
    if task.kind not in ("classification", "pair-classification"):
        return ""
    names = (f"{at}: {json.dumps(label, ensure_ascii=False)}" for at, label in enumerate(public_labels(task)))
    return f", id2label={{{', '.join(names)}}}"


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
