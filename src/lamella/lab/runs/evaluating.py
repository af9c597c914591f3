"""A trained model on a task: its scores, and how its routers sent the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.lab.data import Encoded
from lamella.lab.runs.by_task import BY_TASK, scores_of, task_scores, traced_scores
from lamella.lab.runs.callbacks import routing_summary
from lamella.lab.runs.trained import Trained, load_trained
from lamella.lab.scoring import Columns, Scores, metrics_of, selection
from lamella.tracing import Trace, record_routing
from lamella.tuners.optimization import is_routed


@dataclass(frozen=True)
class Evaluation:
    """Scores on one split.

    Attributes:
        task: its name.
        split: which one.
        rows: how many examples were scored.
        metric: name of the task's metric, one of `metrics`.
        metrics: every metric by name.
        columns: one entry per example, as `lamella.lab.scoring.Scores.columns`.
        notes: which rows were trained on, how they differ from the run's, what reading them cut or dropped.
        trained_on: how many of the rows the model was trained on; None where that cannot be checked.
        unseen: the metrics over the others, where some were trained on and some were not.
        by_task: of several tasks, the score of each with its interval, as `task_scores`.
    """

    task: str
    split: str
    rows: int
    metric: str
    metrics: dict[str, float]
    columns: Columns
    notes: tuple[str, ...]
    trained_on: int | None = None
    unseen: dict[str, float] | None = None
    by_task: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything but the examples, as plain values for JSON."""
        return {
            "task": self.task,
            "split": self.split,
            "rows": self.rows,
            "metric": self.metric,
            "metrics": self.metrics,
            "trained_on": self.trained_on,
            "unseen": self.unseen,
            **({"by_task": list(self.by_task)} if self.by_task else {}),
            "notes": list(self.notes),
        }

    def save_examples(self, path: Path) -> None:
        """Write a row per example as Parquet, completely or not at all; its folder is made."""
        _write_atomic(pd.DataFrame({"split": self.split, **self.columns}), path)


@dataclass(frozen=True)
class Traced:
    """What the routers did on one split.

    Attributes:
        trained: the model.
        evaluation: its scores on the rows that were traced.
        frame: the routing over all of them, as `Trace.frame`.
        coactivation: which experts their tokens chose together, as `Trace.coactivation`.
        tokens: the routing of each token of the first rows, as `Trace.tokens`.
        texts: title and tokens of every sequence in `tokens`, in its order.
        by_task: of several tasks, `frame` of each, with a column ``task``.
    """

    trained: Trained
    evaluation: Evaluation
    frame: pd.DataFrame
    coactivation: pd.DataFrame
    tokens: pd.DataFrame
    texts: tuple[tuple[str, list[str]], ...]
    by_task: pd.DataFrame | None = None

    @property
    def num_experts(self) -> dict[tuple[str, int], int]:
        """Experts of each (stack, layer)."""
        counts: dict[tuple[str, int], int] = self.frame.groupby(["stack", "layer"])["num_experts"].max().to_dict()
        return counts

    @property
    def summary(self) -> dict[str, float]:
        """Entropy, balance and dead experts, as `lamella.lab.runs.callbacks.routing_summary`."""
        return routing_summary(self.frame)

    def save(self, folder: Path) -> None:
        """Write `frame` as ``trace.parquet`` beside `coactivation`, each atomically; the folder is made."""
        _write_atomic(self.frame, folder / "trace.parquet")
        _write_atomic(self.coactivation, folder / "coactivation.parquet")
        if self.by_task is not None:
            _write_atomic(self.by_task, folder / BY_TASK)


def evaluate(path: Path, task: str | None = None, split: str = "test", base: str | None = None) -> Evaluation:
    """Score the model of a run or an adapter on a split of a task, all of its rows, read as in the run.

    Rows that the run was trained on are scored too, and said to be: see `Evaluation.notes` and `Evaluation.unseen`.

    Args:
        path: folder of the run or the adapter.
        task: any task that fits the trained head; the run's when None.
        split: "train", "validation" or "test".
        base: the adapter's base model, if not the one of the run or the adapter.

    Raises:
        LamellaError: there is nothing to load, the task does not fit the head, or it has no such split.
    """
    return _evaluate(load_trained(path, task, base), split)


def trace(
    path: Path,
    task: str | None = None,
    *,
    split: str = "test",
    rows: int = 256,
    shown: int = 8,
    base: str | None = None,
) -> Traced:
    """Score a routed model on at most ``rows`` rows of a split, and record its routing, of ``shown`` rows by token.

    Raises:
        LamellaError: as `evaluate`, or the model has no routers.
    """
    trained = load_trained(path, task, base)
    if not is_routed(trained.model):
        raise LamellaError(f"{path} holds a model without routers, so there is no routing to trace.")
    read, encoded = trained.rows(split, rows)
    size = trained.place.reading.eval_batch_size
    traced = traced_scores(trained.model, trained.task, {split: read}, encoded.collator, size)
    evaluation = _evaluation(trained, split, rows, encoded, traced.scores[split])
    tokens, texts = _by_token(trained, split, min(shown, rows))
    frame, together = traced.trace.frame, traced.trace.coactivation
    return Traced(trained, evaluation, frame, together, tokens, tuple(texts), traced.by_task)


def _evaluate(trained: Trained, split: str) -> Evaluation:
    rows, encoded = trained.rows(split)
    size = trained.place.reading.eval_batch_size
    scores = scores_of(trained.model, trained.task, {split: rows}, encoded.collator, size)[split]
    return _evaluation(trained, split, None, encoded, scores)


def _evaluation(trained: Trained, split: str, count: int | None, encoded: Encoded, scores: Scores) -> Evaluation:
    examples = len(next(iter(scores.columns.values())))
    known = trained.seen(split, count).trained
    unseen = None
    if known is not None and 0 < known.sum() < examples == len(known):  # packed prose has other examples than rows
        unseen = metrics_of(trained.task, {name: column[~known] for name, column in scores.columns.items()})
    return Evaluation(
        task=trained.task.name,
        split=split,
        rows=examples,
        metric=selection(trained.task).name,
        metrics=scores.metrics,
        columns=scores.columns,
        notes=encoded.notes,
        trained_on=None if known is None else int(known.sum()),
        unseen=unseen,
        by_task=tuple(task_scores(trained.task, scores.columns)),
    )


def _write_atomic(frame: pd.DataFrame, path: Path) -> None:
    with atomic(path) as unfinished:
        frame.to_parquet(unfinished)


def _by_token(trained: Trained, split: str, count: int) -> tuple[pd.DataFrame, list[tuple[str, list[str]]]]:
    """Each row by itself, so that nothing is padded; of an encoder-decoder model, what its encoder read."""
    rows, encoded = trained.rows(split, count)
    texts: list[tuple[str, list[str]]] = []
    with record_routing(trained.model, per_token=True) as recorded, torch.no_grad():
        for index in range(min(count, len(rows))):
            batch = encoded.collator([rows[index]])
            trained.model(**batch)
            texts += _texts(batch, f"row {index + 1}", trained.tokenizer)
    return _of_inputs(recorded, trained), texts


def _of_inputs(recorded: Trace, trained: Trained) -> pd.DataFrame:
    tokens = recorded.tokens
    tokens = tokens[tokens["position"] >= 0]  # MoLEx decides for whole sequences
    if getattr(trained.model.config, "is_encoder_decoder", False):
        tokens = tokens[tokens["stack"] == tokens["stack"].iloc[0]]
    return tokens


def _texts(batch: dict[str, Any], title: str, tokenizer: Any) -> list[tuple[str, list[str]]]:
    """The sequences of a batch as tokens to show; each option of a choice is a sequence."""
    width = batch["input_ids"].shape[-1]
    ids, real = batch["input_ids"].view(-1, width), batch["attention_mask"].view(-1, width).bool()
    several = len(ids) > 1
    return [
        (f"{title}, option {option + 1}" if several else title, _shown(row[mask].tolist(), tokenizer))
        for option, (row, mask) in enumerate(zip(ids, real, strict=True))
    ]


def _shown(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the decoded text, so that one after the other they read as the text does."""
    texts = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]
