"""What a language model has forgotten of its base: its loss on plain text, beside the base's on the same text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from peft import PeftModel
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.data import Backbone, Encoded, Task, encode, load_task
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.tasks import rows_used
from lamella.lab.scoring import Columns, score
from lamella.statistics import ratio_interval

ROWS = 64
RISE = "plain text rise"  # the metric's name in tables of studies


class PlainText:
    """Texts of a task, at most 64 of those that test it, and the base's loss on each of them."""

    def __init__(self, settings: RunSettings, name: str, backbone: Backbone) -> None:
        """Read them.

        Raises:
            LamellaError: the model is no decoder, or the task has no running text to test on.
        """
        self.task: Task = load_task(name)
        if not backbone.decoder or self.task.kind != "causal-lm" or "test" not in self.task.splits:
            raise LamellaError(
                f"plain_text={name} is to show what a language model forgets: it needs a decoder, and a task of "
                f"running text with test rows. {backbone.name} on a {self.task.kind} task is not that."
            )
        self._size = settings.eval_batch_size
        self._encoded: Encoded = encode(
            rows_used(self.task, "test", ROWS), backbone.tokenizer, max_length=settings.max_length, decoder=True
        )
        self._base: Columns | None = None

    def measure_base(self, model: nn.Module) -> None:
        """Take the loss of the model without its adapter; of one without adapters, as it is before it is trained."""
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            self._base = self._columns(model)

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """Nats per token ``before`` and ``after``, their difference ``rise`` with its 95 % interval over texts."""
        assert self._base is not None  # measured before training
        after = self._columns(model)
        tokens = after["tokens"].astype(float)
        interval = ratio_interval(after["nll"] - self._base["nll"], tokens)
        return {
            "task": self.task.name,
            "rows": len(tokens),
            "before": float(self._base["nll"].sum() / tokens.sum()),
            "after": float(after["nll"].sum() / tokens.sum()),
            "rise": interval.difference,
            "interval": [interval.low, interval.high],
        }

    def _columns(self, model: nn.Module) -> Columns:
        rows: Any = self._encoded.test
        return score(model, self.task, rows, self._encoded.collator, self._size).columns


def plain_text_sentence(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    low, high = measured["interval"]
    return (
        f"Loss on plain text ({measured['task']}, {measured['rows']} texts): {measured['before']:.3f} nats per token "
        f"for the base, {measured['after']:.3f} now, {measured['rise']:+.3f} [{low:+.3f}, {high:+.3f}]."
    )
