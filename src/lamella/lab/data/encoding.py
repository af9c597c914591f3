"""A task as a model reads it: every split tokenised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError
from lamella.lab.data.task import Task
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
        train, validation, test: columns `input_ids`, `attention_mask`, `labels`, `length` (tokens of the row), and
            `token_type_ids` where the model takes them. Evaluation rows of multiple choice on a decoder stand one
            option a row and carry `row` (index of the question), `choice` (index of the option) and `answer`.
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
    encoder = RowEncoder(task.kind, task.name, tokenizer, max_length, packing, decoder)
    done: dict[str, Dataset | None] = dict.fromkeys(_SPLITS)
    notes: list[str] = []
    for name, split in task.splits.items():
        encoded, said = encoder(_limited(list(split), name, limit or {}, seed), name, evaluation=name != "train")
        done[name] = _dataset(encoded)
        notes += [f"{name}: {note}" for note in said]
    return Encoded(**done, collator=Collator.of(tokenizer), notes=tuple(notes))


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
