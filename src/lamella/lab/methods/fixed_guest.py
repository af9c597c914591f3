"""The best single guest for a task: what MoLEx's router has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.tuners.molex import MolexConfig, best_fixed_layer
from lamella.tuners.molex.search import loss_of_model

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

_ROWS = 256
_BATCH = 32
_LENGTH = 64
_RIDGE = 1e-2


def find_fixed_layer(backbone: Backbone, task: Task, config: MolexConfig) -> int:
    """The block that serves best as every block's guest, on at most 256 training rows and before any training.

    A language model is judged by its loss. A task head knows nothing yet, so its place is taken by a ridge
    regression of the labels on the mean of the last hidden states, fitted on one half of the rows and judged on the
    other.
    """
    from lamella.lab.data import encode

    training = task.of_each(lambda part: {name: rows for name, rows in part.splits.items() if name == "train"})
    encoded = encode(training, backbone.tokenizer, max_length=_LENGTH, limit={"train": _ROWS}, decoder=backbone.decoder)
    assert encoded.train is not None  # a method is built for a task to be trained on
    rows = [encoded.train[i] for i in range(len(encoded.train))]
    if task.parts:
        rows = rows[::2] + rows[1::2]  # they lie task by task, and each half is to have all tasks
    if task.kind in ("causal-lm", "seq2seq", "multiple-choice"):
        batches = [encoded.collator(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
        return best_fixed_layer(backbone.model, batches, config, loss_of_model)
    return best_fixed_layer(backbone.model, [encoded.collator(rows)], config, probe_loss)


def training_texts(task: Task) -> list[str]:
    """Texts of at most 256 training rows, spread evenly, for what is fitted on texts before training.

    Raises:
        LamellaError: no column of the rows is a text.
    """
    rows = task.splits["train"]
    column = next((name for name, values in rows[:1].items() if isinstance(values[0], str)), None)
    if column is None:
        raise LamellaError(
            f"The rows of '{task.name}' have no column of text to fit the aligner of a second model on. Use "
            "guest_aligner=identity, or another task."
        )
    return list(rows.select(range(0, len(rows), -(-len(rows) // _ROWS)))[column])


def probe_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Squared error of a ridge regression from pooled hidden states to labels, on the half it was not fitted on."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    states = model(**inputs, output_hidden_states=True).hidden_states[-1].double()  # (B, T, d)
    mask = batch["attention_mask"].double()[..., None]  # (B, T, 1)
    pooled = (states * mask).sum(1) / mask.sum(1)  # (B, d)
    pooled = torch.cat([pooled, torch.ones_like(pooled[:, :1])], dim=1)
    labels = batch["labels"]
    target = labels[:, None].double() if labels.is_floating_point() else nn.functional.one_hot(labels).double()
    half = len(pooled) // 2
    x, y = pooled[:half], target[:half]
    gram = x.T @ x + _RIDGE * half * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ y)  # (d + 1, classes)
    return (pooled[half:] @ weights - target[half:]).square().sum(1).mean()
