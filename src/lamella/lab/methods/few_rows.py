"""Scoring a model on a task's training rows, for methods that choose by them without a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from lamella.lab.runs.scoring import score

if TYPE_CHECKING:
    from lamella.lab.data import Backbone, Task

_BATCH = 64


class FewRows:
    """The training rows of a task, read as they are scored.

    Args:
        rows: how many of them, the same ones always; all where None.
    """

    def __init__(self, backbone: Backbone, task: Task, max_length: int, rows: int | None = None) -> None:
        from lamella.lab.data import encode

        # multiple choice is read in another way to train on than to be scored, and that hangs on the split's name
        self._task = replace(task, splits={"validation": task.splits["train"]})
        limit = None if rows is None else {"validation": rows}
        self._encoded = encode(
            self._task, backbone.tokenizer, max_length=max_length, limit=limit, decoder=backbone.decoder
        )

    def scores(self, model: nn.Module) -> dict[str, float]:
        """The metrics of a model on them."""
        rows = self._encoded.validation
        assert rows is not None
        return score(model, self._task, rows, self._encoded.collator, _BATCH).metrics
