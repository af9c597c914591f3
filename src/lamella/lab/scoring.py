"""A model's scores on a split: the task's metrics, and one row per example for paired comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from lamella.diagnostics.running import preserve_state
from lamella.errors import LamellaError
from lamella.lab.data import Task
from lamella.lab.data.models import is_decoder
from lamella.lab.metrics import Metric, accuracy, macro_f1, mean_squared_error, metric_for
from lamella.progress import counted
from lamella.statistics import perplexity

if TYPE_CHECKING:
    from datasets import Dataset

    from lamella.lab.data import Encoded

Columns = dict[str, npt.NDArray[Any]]
Collator = Callable[[list[Any]], Mapping[str, torch.Tensor]]
# classes: a score for each class or choice; value: one number; tokens: a loss for each token of the labels;
# options: as tokens, and the likeliest of a question's options is its answer
Form = Literal["classes", "value", "tokens", "options"]


@dataclass(frozen=True)
class Scores:
    """Metrics of a split by name, and the columns behind them, one entry per example in the split's order.

    Columns: ``label``, ``prediction``, ``correct`` and, with a head, ``nll`` (classes and choices); ``label``,
    ``prediction`` and ``squared_error`` (regression); ``nll`` (nats, summed) and ``tokens`` (language models). Of
    several tasks also ``task``, the name of the example's.
    """

    metrics: dict[str, float]
    columns: Columns


@dataclass(frozen=True)
class Selection:
    """The metric that chooses between checkpoints and settings."""

    name: str
    greater_is_better: bool


def selection(task: Task) -> Selection:
    """The task's metric; perplexity where that one would need generated text."""
    if task.kind in ("causal-lm", "seq2seq"):
        return Selection("perplexity", False)
    metric: Metric = metric_for(task.metric)
    return Selection(metric.name, metric.greater_is_better)


def trains_tokens(task: Task, model: nn.Module) -> bool:
    """Whether ``model`` learns ``task`` as a decoder: from a loss for each token of its labels."""
    return task.kind in ("causal-lm", "seq2seq", "multiple-choice") and is_decoder(model.config)


def score(model: nn.Module, task: Task, rows: Dataset, collator: Collator, batch_size: int) -> Scores:
    """Score ``rows`` in evaluation mode without gradients; in a process group each process does its share of them.

    Raises:
        LamellaError: there are no rows, or the model's outputs are not finite.
    """
    if len(rows) == 0:
        raise LamellaError(f"'{task.name}' has no row to score here. Give a split, or a number of rows, that has some.")
    form = _form(task, model)
    read = _row_columns if form in ("classes", "value") else _token_columns
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = next(model.parameters()).device
    parts: list[tuple[list[int], Columns]] = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in counted(length_batches(rows["length"], batch_size)[rank::world], "scoring", "batches"):
            inputs = {key: value.to(device) for key, value in collator([rows[i] for i in batch]).items()}
            parts.append((batch, read(task, model, inputs)))
    model.train(training)
    columns = _in_order(_from_everyone(parts, world), len(rows))
    if task.parts:
        columns["task"] = np.asarray(rows["task"])
    if form == "options":
        columns = _answers(columns, rows)
    return Scores(metrics_of(task, columns), columns)


def refuse_longer_rows(model: nn.Module, encoded: Encoded) -> None:
    """Runs the longest row of a task, since no config says for certain how many tokens a model can read.

    Raises:
        LamellaError: the model cannot read it.
    """
    splits = [rows for rows in (encoded.train, encoded.validation, encoded.test) if rows is not None]
    longest = max(splits, key=lambda rows: max(rows["length"]))
    length = max(longest["length"])
    row = encoded.collator([longest[longest["length"].index(length)]])
    device = next(model.parameters()).device
    try:
        with preserve_state(model), torch.no_grad():
            model.eval()
            model(**{name: value.to(device) for name, value in row.items()})
    except (RuntimeError, IndexError) as error:
        raise LamellaError(
            f"The model cannot read a row of {length} tokens, the longest of the task: {str(error).splitlines()[0]}. "
            "Lower max_length to the number of positions that it has, or choose a model that reads longer rows."
        ) from error


def _form(task: Task, model: nn.Module) -> Form:
    if task.kind == "regression":
        return "value"
    if task.kind in ("causal-lm", "seq2seq"):
        return "tokens"
    return "options" if trains_tokens(task, model) else "classes"


def length_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Rows alike in length together, longest first: little padding, and memory peaks early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _row_columns(task: Task, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Columns:
    labels = inputs.pop("labels").cpu()
    logits = _finite(model(**inputs).logits, task).float().cpu()  # (B, classes), or (B, 1) in regression
    if task.kind == "regression":
        values = logits.squeeze(-1)
        return {
            "label": labels.numpy(),
            "prediction": values.numpy(),
            "squared_error": ((values - labels) ** 2).numpy(),
        }
    logits = own_logits(logits, labels, task.heads)
    predictions = logits.argmax(-1)
    return {
        "label": labels.numpy(),
        "prediction": predictions.numpy(),
        "correct": (predictions == labels).numpy(),
        "nll": nn.functional.cross_entropy(logits, labels, reduction="none").numpy(),
    }


def own_logits(logits: torch.Tensor, labels: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Logits (B, classes) in which each row keeps those of its own task's head; the others are minus infinity.

    Args:
        logits: of all heads side by side.
        labels: (B,), which say whose head a row is for.
        heads: of each class, as `Task.heads`; empty where all are one head.
    """
    if not heads:
        return logits
    of_class = torch.tensor(heads, device=logits.device)
    return logits.masked_fill(of_class != of_class[labels].unsqueeze(1), -torch.inf)


def _token_columns(task: Task, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Columns:
    labels = inputs["labels"]  # (B, T)
    logits = _finite(model(**inputs).logits, task)[:, -labels.shape[1] :]  # prompt tuning puts virtual tokens in front
    if is_decoder(model.config):  # position t predicts the token at t + 1
        logits, labels = logits[:, :-1], labels[:, 1:]
    nll = [
        # row by row: a whole batch of float32 log-probabilities over a vocabulary is large
        nn.functional.cross_entropy(row.float(), target, ignore_index=-100, reduction="sum").item()
        for row, target in zip(logits, labels, strict=True)
    ]
    return {"nll": np.asarray(nll), "tokens": (labels != -100).sum(1).cpu().numpy()}


def _answers(columns: Columns, rows: Dataset) -> Columns:
    """From one entry per option to one per question: the option with the least loss per token is chosen."""
    question, choice = np.asarray(rows["row"]), np.asarray(rows["choice"])
    loss = columns["nll"] / columns["tokens"]
    order = np.lexsort((loss, question))
    best = order[np.unique(question[order], return_index=True)[1]]
    label = np.asarray(rows["answer"])[best]
    answers = {"label": label, "prediction": choice[best], "correct": choice[best] == label}
    return answers | ({"task": columns["task"][best]} if "task" in columns else {})


def metrics_of(task: Task, columns: Columns) -> dict[str, float]:
    """The metrics that follow from the columns of `Scores`.

    Raises:
        LamellaError: there are no rows, or none of their tokens is scored.
    """
    if not len(next(iter(columns.values()))):
        raise LamellaError(f"'{task.name}' has no scored row here, and a metric of none says nothing.")
    if task.parts:
        return _over_tasks(task, columns)
    if "tokens" in columns:
        nll, tokens = float(columns["nll"].sum()), int(columns["tokens"].sum())
        return {"perplexity": perplexity(nll, tokens), "loss": nll / tokens}
    predictions, labels = columns["prediction"], columns["label"]
    chosen = metric_for(task.metric)
    metrics = {chosen.name: chosen.function(predictions, labels)}
    if "squared_error" in columns:
        return metrics | {"loss": mean_squared_error(predictions, labels)}
    metrics |= {"accuracy": accuracy(predictions, labels), "macro_f1": macro_f1(predictions, labels)}
    return metrics | ({"loss": float(columns["nll"].mean())} if "nll" in columns else {})


def summands(columns: Columns) -> tuple[str, npt.NDArray[np.float64]]:
    """A measure that is a mean over examples, and its summands (examples,), which can be paired and resampled."""
    for column, measure in (("correct", "accuracy"), ("squared_error", "mean_squared_error")):
        if column in columns:
            return measure, columns[column].astype(np.float64)
    return "loss", columns["nll"].astype(np.float64) / columns["tokens"].mean()  # so the mean is the loss per token


def _over_tasks(task: Task, columns: Columns) -> dict[str, float]:
    by_task: dict[str, dict[str, float]] = {}
    for part in task.parts:
        of_part = columns["task"] == part.name
        if of_part.any():
            by_task[part.name] = metrics_of(part, {name: column[of_part] for name, column in columns.items()})
    return over_tasks(by_task)


def over_tasks(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the tasks of what all of them have, and every metric of each as ``TASK/METRIC``.

    The perplexity is that of the mean loss: the geometric mean of theirs.
    """
    scores = list(by_task.values())
    shared = [name for name in scores[0] if all(name in one for one in scores)]
    means = {name: float(np.mean([one[name] for one in scores])) for name in shared}
    if "perplexity" in means:
        means["perplexity"] = perplexity(means["loss"], 1)
    return means | {f"{name}/{metric}": value for name, one in by_task.items() for metric, value in one.items()}


def _from_everyone(parts: list[tuple[list[int], Columns]], world: int) -> list[tuple[list[int], Columns]]:
    if world == 1:
        return parts
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, parts)
    return [part for one in everyone for part in one]


def _in_order(parts: list[tuple[list[int], Columns]], count: int) -> Columns:
    order = np.concatenate([batch for batch, _ in parts])
    columns: Columns = {}
    for name in parts[0][1]:
        values = np.concatenate([part[name] for _, part in parts])
        columns[name] = np.empty(count, values.dtype)
        columns[name][order] = values
    return columns


def _finite(logits: torch.Tensor, task: Task) -> torch.Tensor:
    if not torch.isfinite(logits).all():
        raise LamellaError(
            f"The model's outputs on '{task.name}' are not finite: its weights have blown up. Train again with a "
            "lower lr or a larger warmup_ratio."
        )
    return logits
