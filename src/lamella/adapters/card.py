"""The card that may lie beside a LoRA: what it was trained for, in a form that retrieval can read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.files import read_json

CARD = "lamella_card.json"


@dataclass(frozen=True)
class Card:
    """What a LoRA was trained for; no row of text is in it.

    Attributes:
        task: the task's name.
        labels: the words of its labels; empty where it has none.
        centroids: by module, means of what the base gives that module over groups of the training rows, ``c`` lists of
            as many numbers as the module has inputs.
    """

    task: str = ""
    labels: tuple[str, ...] = ()
    centroids: Mapping[str, list[list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def tensor(self, module: str, width: int) -> Tensor:
        """A module's centroids, ``(c, in)``; one row of zeros where it has none."""
        return torch.tensor(self.centroids.get(module) or [[0.0] * width])


def read_card(folder: Path) -> Card:
    """The card in a LoRA's folder; an empty one where there is none.

    Raises:
        LamellaError: it is damaged.
    """
    path = folder / CARD
    if not path.is_file():
        return Card()
    values = read_json(path)
    try:
        card = Card(str(values["task"]), tuple(map(str, values["labels"])), values["centroids"])
        numbers = [card.tensor(module, 1) for module in card.centroids]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LamellaError(
            f"{path} is damaged ({error!r}). Restore it, or delete it: the LoRA does without."
        ) from error
    if not all(one.dim() == 2 and bool(one.isfinite().all()) for one in numbers):
        raise LamellaError(f"{path} has centroids that are not lists of finite numbers. Restore it, or delete it.")
    return card
