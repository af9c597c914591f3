"""A task as a model reads it: every split tokenised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError
from lamella.lab.data.task import Task
from lamella.progress import working
from lamella.texts.collating import Collator
from lamella.texts.encoding import RowEncoder
from lamella.texts.rows import Row, sample_indices

if TYPE_CHECKING:
    from datasets import Dataset

_SPLITS = ("train", "validation", "test")
_EVALUATION_SEED = 0  # limited evaluation splits are the same rows in every run, so that runs can be paired


@dataclass(frozen=True)
class Encoded:
    """A task as a model reads it.

    Attributes:
        train, validation, test: columns `input_ids`, `attention_mask`, `labels`, `length` (tokens of the row), `task`
            (the name of the task that the row is of), and `token_type_ids` where the model takes them. Evaluation rows
            of multiple choice on a decoder stand one option a row and carry `row` (index of the question), `choice`
            (index of the option) and `answer`.
        collator: makes a padded batch of rows; give it to the Trainer as `data_collator`.
        notes: what encoding cut or dropped.
    """

    train: Dataset | None
    validation: Dataset | None
    test: Dataset | None
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    notes: tuple[str, ...] = ()


def encode(
    task: Task,
    tokenizer: Any,
    *,
    max_length: int = 128,
    packing: bool = False,
    limit: Mapping[str, int] | None = None,
    seed: int = 0,
    decoder: bool | None = None,
) -> Encoded:
    """Tokenise every split of a task.

    Loss positions: all real tokens of prose; only the completion of prompt/completion rows; only what the assistant
    says in chat `messages`; only the target of seq2seq rows. All other labels are −100.

    Args:
        task: raw rows.
        tokenizer: of the model.
        max_length: longest row, in tokens. Prompts are cut on their left, everything else on its right.
        packing: prose only: join all rows and cut blocks of exactly `max_length` tokens.
        limit: rows used of a split, {"train": 500}; a sample by `seed` in train, the same rows always elsewhere.
        seed: of the training sample.
        decoder: whether the model is a decoder without an encoder (`Backbone.decoder`). It decides how multiple choice
            and seq2seq are written. None: a tokenizer without mask token is a decoder's in multiple choice; seq2seq
            means an encoder-decoder.

    Raises:
        LamellaError: a setting that does not fit the task, a tokenizer without chat template, rows that cannot be used.
    """
    if packing and not (task.kind == "causal-lm" and "text" in next(iter(task.splits.values())).column_names):
        raise LamellaError(f"packing joins running prose, but {task.name} is a {task.kind} task without a text column.")
    unknown = set(limit or {}) - set(task.splits)
    if unknown:
        raise LamellaError(f"limit names {', '.join(sorted(unknown))}, but {task.name} has {', '.join(task.splits)}.")
    if task.kind == "multiple-choice" and task.parts and not decoder:
        raise LamellaError(f"{task.name} asks questions with options of several tasks, which needs a decoder.")
    done: dict[str, list[Row]] = {}
    notes: list[str] = []
    for part in task.tasks:
        encoder = RowEncoder(part.kind, part.name, tokenizer, max_length, packing, decoder)
        for name, split in part.splits.items():
            rows = _limited(list(split), name, _shares(limit or {}, len(task.tasks)), seed)
            with working(f"encoding {len(rows):,} rows of {part.name} ({name})"):
                encoded, said = encoder(rows, name, evaluation=name != "train")
            before = done.setdefault(name, [])
            before += _placed(
                encoded, part.name, task.first_label(part), before[-1].get("row", -1) + 1 if before else 0
            )
            notes += [f"{part.name}, {name}: {note}" if task.parts else f"{name}: {note}" for note in said]
    return Encoded(
        **{name: _dataset(done[name]) if name in done else None for name in _SPLITS},
        collator=Collator.of(tokenizer),
        notes=tuple(notes),
    )


def _shares(limit: Mapping[str, int], tasks: int) -> dict[str, int]:
    """What each of several tasks gives to a limited split."""
    return {split: count if count < 1 else math.ceil(count / tasks) for split, count in limit.items()}


def _placed(rows: list[Row], task: str, first_label: int, first_question: int) -> list[Row]:
    """Encoded rows of a task behind those of others: labels and questions are counted on."""
    for row in rows:
        row["task"] = task
        if first_label:
            row["labels"] += first_label
        if "row" in row:
            row["row"] += first_question
    return rows


def _limited(rows: list[Row], split: str, limit: Mapping[str, int], seed: int) -> list[Row]:
    count = limit.get(split)
    if count is not None and count < 1:
        raise LamellaError(f"limit of {count} rows for {split}: use at least 1, or leave the split out of the limit.")
    return [rows[at] for at in sample_indices(len(rows), count, seed if split == "train" else _EVALUATION_SEED)]


def _dataset(rows: list[Row]) -> Dataset:
    from datasets import Dataset

    for row in rows:
        ids = row["input_ids"]
        row["length"] = max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    return Dataset.from_dict({column: [row[column] for row in rows] for column in rows[0]})
