"""Which of a task's answers a language model finds likeliest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.data import Backbone, Task, encode
from lamella.lab.scoring import length_batches
from lamella.progress import counted

_MOST = 26  # as many as letters that stand for options


def with_options(task: Task) -> Task:
    """A seq2seq task whose label names are the answers that its rows have: what its questions can be answered with.

    Raises:
        LamellaError: there is one answer only, or too many to be options.
    """
    options = sorted({answer for split in task.splits.values() for answer in split["target"]})
    if not 1 < len(options) <= _MOST:
        raise LamellaError(
            f"The rows of {task.name} have {len(options)} different answers. A study that compares the likelihood of "
            f"options needs a task with 2 to {_MOST} of them."
        )
    return replace(task, label_names=tuple(options))


def option_answers(model: nn.Module, backbone: Backbone, task: Task, max_length: int, batch_size: int) -> pd.DataFrame:
    """A row per test question, in order: ``label``, the right option's index, and ``log_probs`` of all options.

    An option's log-probability is the sum over its tokens after the question, without the end token; those of a
    question are then normalised to add up to 1 as probabilities. Written as such a task is learnt: the question, a line
    break, the answer.

    Args:
        model: a decoder in evaluation mode.
        backbone: whose tokenizer it reads with.
        task: as `with_options` gives it.
        max_length: tokens; longer questions lose their left end.
        batch_size: texts per forward.

    Raises:
        LamellaError: the backbone is not a decoder.
    """
    if not backbone.decoder:
        raise LamellaError(
            f"Options are compared by their likelihood after a question, which needs a decoder, and {backbone.name} is "
            "not one. Choose one, such as smollm2, or say answers: classes."
        )
    options = task.label_names
    ids = [backbone.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
    alike = _alike(ids)
    asked = _asked(task, [options[group[0]] for group in alike])
    encoded = encode(asked, backbone.tokenizer, max_length=max_length, decoder=True)
    rows: Any = encoded.test
    sums = np.empty((len(task.splits["test"]), len(options)))
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in counted(length_batches(rows["length"], batch_size), "answering", "batches"):
            inputs = {name: value.to(device) for name, value in encoded.collator([rows[i] for i in batch]).items()}
            # with labels, since they tell routers where the question ends
            logits, labels = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
            for at, index in enumerate(batch):
                logs = logits[at][labels[at] != -100].double().log_softmax(-1)  # (tokens of the answer, vocabulary)
                question, group = divmod(index, len(alike))
                for option in alike[group]:
                    sums[question, option] = logs[range(len(ids[option])), ids[option]].sum().item()
    sums -= np.logaddexp.reduce(sums, axis=1, keepdims=True)
    right = [options.index(answer) for answer in task.splits["test"]["target"]]
    return pd.DataFrame({"label": right, "log_probs": list(sums)})


def _alike(ids: list[list[int]]) -> list[list[int]]:
    """Which options differ in their last token only: one forward serves all of them, as no token sees itself."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for option, tokens in enumerate(ids):
        groups.setdefault(tuple(tokens[:-1]), []).append(option)
    return list(groups.values())


def _asked(task: Task, answers: list[str]) -> Task:
    """The test questions, each with every one of these answers in turn."""
    from datasets import Dataset

    pairs = [(question, answer) for question in task.splits["test"]["source"] for answer in answers]
    columns = {"source": [question for question, _ in pairs], "target": [answer for _, answer in pairs]}
    return replace(task, splits={"test": Dataset.from_dict(columns)})
