"""Labelled examples, and a model's loss on each of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamella.backbones.offloading import input_device
from lamella.errors import LamellaError
from lamella.texts.collating import IGNORED

Batch = Mapping[str, Tensor]


class Judged(NamedTuple):
    """What a model makes of some examples.

    Attributes:
        losses: in nats of a label or of a label's tokens on average; squared errors of numbers. ``(rows,)``.
        right: whether the likeliest class is the label, ``(rows,)``; None where examples have no classes.
    """

    losses: Tensor
    right: Tensor | None = None


class Examples:
    """Batches with labels, whose rows can be asked for one by one.

    Args:
        batches: what the model is called with, ``labels`` among it; rows in random order.

    Raises:
        LamellaError: there are none, or one has no labels.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = [dict(batch) for batch in batches]
        without = next(
            (at for at, batch in enumerate(self._batches) if not isinstance(batch.get("labels"), Tensor)), None
        )
        if without is not None:
            raise LamellaError(
                f"Batch {without} of the examples has no labels, and LoRAs are compared by their loss on them. Give "
                "batches with a tensor of labels, as for training."
            )
        self._at = [(number, row) for number, batch in enumerate(self._batches) for row in range(len(batch["labels"]))]
        if not self._at:
            raise LamellaError("There are no examples to compare LoRAs on; give at least one batch with labels.")

    def __len__(self) -> int:
        return len(self._at)

    def judge(self, model: nn.Module, rows: Sequence[int]) -> Judged:
        """What a model makes of some examples.

        Raises:
            LamellaError: labels that are neither a class, a number nor the tokens of a generating model.
        """
        losses = torch.zeros(len(rows), dtype=torch.float64)
        right: Tensor | None = None
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(self._at[row][0], []).append(place)
        device = input_device(model)
        for number, those in places.items():
            chosen = torch.tensor([self._at[rows[place]][1] for place in those])
            whole = len(self._batches[number]["labels"])
            batch = {
                key: (value[chosen] if isinstance(value, Tensor) and len(value) == whole else value)
                for key, value in self._batches[number].items()
            }
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            found = _judged(model, batch)
            losses[torch.tensor(those)] = found.losses.double().cpu()
            if found.right is not None:
                right = torch.zeros_like(losses) if right is None else right
                right[torch.tensor(those)] = found.right.double().cpu()
        return Judged(losses, right)


def _judged(model: nn.Module, batch: dict[str, Any]) -> Judged:
    labels = batch["labels"]
    config: Any = model.config
    given = batch if config.is_encoder_decoder else {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**given).logits.float()
    if labels.dim() == 1 and labels.is_floating_point():
        return Judged((logits.squeeze(-1) - labels).square())
    if labels.dim() == 1 and logits.dim() == 2:
        return Judged(nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels)
    generates = labels.dim() == 2 and logits.dim() == 3 and bool(getattr(model, "can_generate", bool)())
    if not generates:
        raise LamellaError(
            f"Labels of shape {tuple(labels.shape)} beside logits of shape {tuple(logits.shape)} of "
            f"{type(model).__name__} are neither a class or a number for each example, nor the tokens that a language "
            "model is to say; give examples of one of these kinds."
        )
    if not config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]  # (B, T, V), (B, T)
    each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")  # (B, T)
    counted = labels.ne(IGNORED).sum(dim=1)  # (B,)
    return Judged(each.sum(dim=1) / counted.clamp_min(1))
