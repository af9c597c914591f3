"""Labelled examples, and a model's loss on each of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backbones.offloading import input_device
from lamella.errors import LamellaError
from lamella.texts.collating import IGNORED

Batch = Mapping[str, Tensor]


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

    def losses(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """A model's loss on some examples, in nats of a label or of a label's tokens on average, ``(rows,)``.

        Raises:
            LamellaError: labels that are neither a class, a number nor the tokens of a generating model.
        """
        found = torch.zeros(len(rows), dtype=torch.float64)
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
            found[torch.tensor(those)] = _row_losses(model, batch).double().cpu()
        return found


def _row_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """``(rows,)``."""
    labels = batch["labels"]
    config: Any = model.config
    given = batch if config.is_encoder_decoder else {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**given).logits.float()
    if labels.dim() == 1 and labels.is_floating_point():
        return (logits.squeeze(-1) - labels).square()
    if labels.dim() == 1 and logits.dim() == 2:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
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
    return each.sum(dim=1) / counted.clamp_min(1)
