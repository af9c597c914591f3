"""What a trained model answers on many tests: the log-probabilities of every class, text by text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from lamella.data import Task, encode, load_backbone, load_task
from lamella.data.splitting import sample_rows
from lamella.errors import LamellaError
from lamella.training.scoring import length_batches
from lamella.training.settings import RunSettings

if TYPE_CHECKING:
    from datasets import Dataset

Floats = npt.NDArray[np.float64]


def answers(settings: RunSettings, run: Path, tests: Mapping[str, str], rows: int | None) -> pd.DataFrame:
    """A row per test and text: test, row, label, log_probs (natural, a list with an entry per class).

    Args:
        settings: of the run.
        run: its folder.
        tests: tasks by name; their test rows are read as the run reads rows.
        rows: of each test, always the same ones; all where None.

    Raises:
        LamellaError: a test has no classes or no test rows, or the run cannot be loaded.
    """
    tasks = {name: load_task(task) for name, task in tests.items()}
    first = next(iter(tasks.values()))
    backbone = load_backbone(settings.model, first)
    model = settings.method.load(backbone, first, run / "adapter").eval()
    frames = []
    for name, task in tasks.items():
        if task.kind not in ("classification", "pair-classification") or "test" not in task.splits:
            raise LamellaError(
                f"A study of composition compares the probabilities of classes on test rows, and {task.name}, a "
                f"{task.kind} task, has none. Choose classification tasks with a test split."
            )
        only = replace(task, splits={"test": test_of(task, rows)})
        encoded = encode(only, backbone.tokenizer, max_length=settings.max_length, decoder=backbone.decoder)
        assert encoded.test is not None
        found = log_probs(model, encoded.test, encoded.collator, settings.eval_batch_size)
        place = {"test": name, "row": range(len(found)), "label": np.asarray(encoded.test["labels"])}
        frames.append(pd.DataFrame({**place, "log_probs": list(found)}))
    return pd.concat(frames, ignore_index=True)


def test_of(task: Task, rows: int | None) -> Dataset:
    """At most ``rows`` of a task's test rows, always the same ones; all where None."""
    return task.splits["test"] if rows is None else sample_rows(task.splits["test"], rows)


def log_probs(model: nn.Module, rows: Any, collator: Any, batch_size: int) -> Floats:
    """Natural logarithms of the classes' probabilities, (rows, classes)."""
    device = next(model.parameters()).device
    parts, order = [], []
    with torch.no_grad():
        for batch in length_batches(rows["length"], batch_size):
            inputs = {name: value.to(device) for name, value in collator([rows[i] for i in batch]).items()}
            inputs.pop("labels")
            parts.append(model(**inputs).logits.double().log_softmax(-1).cpu().numpy())
            order += batch
    found = np.empty((len(order), parts[0].shape[1]))
    found[order] = np.concatenate(parts)
    return found


def divergence(from_log: Floats, to_log: Floats) -> Floats:
    """KL(p || q) in nats of each row, from the log-probabilities of p and q, both (rows, classes)."""
    difference: Floats = np.exp(from_log) * (from_log - to_log)
    return difference.sum(1)
