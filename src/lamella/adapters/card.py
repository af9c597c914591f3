"""The card that may lie beside a LoRA: what it was trained for, in a form that retrieval can read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.files import read_json, write_atomic

CARD = "lamella_card.json"
_VERSION = 1
_DIGITS = 4  # of a number: far below what moves a cosine


@dataclass(frozen=True)
class Card:
    """What a LoRA was trained for; no row of text is in it.

    Attributes:
        task: the task's name.
        labels: the words of its labels; empty where it has none.
        base: the model whose inputs were measured, as the LoRA names it.
        rows: how many training rows were read.
        centroids: by module, means of what the base gives that module over groups of those rows, ``(c, in)``.
        texts: means of the rows' text embeddings over the same groups, ``(c, features)``; None where there are none.
    """

    task: str = ""
    labels: tuple[str, ...] = ()
    base: str | None = None
    rows: int = 0
    centroids: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Tensor | None = None

    def save(self, folder: Path) -> None:
        """Writes the card into a LoRA's folder, whole or not at all; modules of one input share their centroids."""
        shared: dict[str, list[str]] = {}
        for module, tensor in self.centroids.items():
            shared.setdefault(_written(tensor), []).append(module)
        inputs = [{"modules": modules, "centroids": json.loads(rows)} for rows, modules in shared.items()]
        texts = None if self.texts is None else json.loads(_written(self.texts))
        values = {"version": _VERSION, "task": self.task, "labels": self.labels, "base": self.base, "rows": self.rows}
        write_atomic(folder / CARD, json.dumps({**values, "inputs": inputs, "texts": texts}))

    def refuse_other(self, path: Path, base: str | None, widths: Mapping[str, int]) -> None:
        """Raises where a card is not of a LoRA with this base and these modules, by the number of their inputs.

        Raises:
            LamellaError: it is another LoRA's.
        """
        if self.base != base:
            raise LamellaError(f"{path} is of the base {self.base}, and the LoRA of {base}: it is another LoRA's.")
        for module, width in widths.items():
            has = self.centroids.get(module)
            if has is not None and has.shape[1] != width:
                raise LamellaError(
                    f"{path} has centroids of {has.shape[1]} numbers for {module}, which has {width} inputs: it is "
                    "another LoRA's."
                )


def read_card(path: Path) -> Card:
    """A card.

    Raises:
        LamellaError: it is damaged, or of another version.
    """
    values = read_json(path)
    version = values.get("version")
    if version != _VERSION:
        raise LamellaError(f"{path} is of version {version}, and this lamella reads version {_VERSION}.")
    try:
        centroids = {module: _tensor(one["centroids"]) for one in values["inputs"] for module in one["modules"]}
        texts = None if values["texts"] is None else _tensor(values["texts"])
        labels = tuple(map(str, values["labels"]))
        return Card(str(values["task"]), labels, values["base"], int(values["rows"]), centroids, texts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LamellaError(f"{path} is damaged ({error!r}).") from error


def _written(tensor: Tensor) -> str:
    return json.dumps([[float(f"{number:.{_DIGITS}g}") for number in row] for row in tensor.tolist()])


def _tensor(rows: Any) -> Tensor:
    tensor = torch.tensor(rows, dtype=torch.float32)
    if tensor.dim() != 2 or not tensor.numel() or not bool(tensor.isfinite().all()):
        raise ValueError("centroids that are not lists of finite numbers")
    return tensor
