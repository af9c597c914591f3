"""From raw rows to token ids and labels, for every kind of task."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError
from lamella.lab.data.collating import Collator
from lamella.lab.data.completions import Piece, cut_pieces, message_pieces, prompt_pieces
from lamella.lab.data.packing import packed_blocks
from lamella.lab.data.task import Row, Task

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
        decoder: whether the model is a decoder on its own (`Backbone.decoder`). It decides how multiple choice and
            seq2seq are written. None: a tokenizer without mask token is a decoder's in multiple choice; seq2seq means
            an encoder-decoder.

    Raises:
        LamellaError: a setting that does not fit the task, a tokenizer without chat template, rows that cannot be used.
    """
    if max_length < 2:
        raise LamellaError(f"max_length={max_length} leaves no room for a token and its successor. Use at least 2.")
    if packing and not (task.kind == "causal-lm" and "text" in next(iter(task.splits.values())).column_names):
        raise LamellaError(f"packing joins running prose, but {task.name} is a {task.kind} task without a text column.")
    unknown = set(limit or {}) - set(task.splits)
    if unknown:
        raise LamellaError(f"limit names {', '.join(sorted(unknown))}, but {task.name} has {', '.join(task.splits)}.")
    encoder = _Encoder(task, tokenizer, max_length, packing, decoder)
    done: dict[str, Dataset | None] = dict.fromkeys(_SPLITS)
    notes: list[str] = []
    for name, split in task.splits.items():
        rows = _limited(list(split), name, limit or {}, seed)
        encoded, said = encoder.split(rows, evaluation=name != "train")
        if not encoded:
            raise LamellaError(
                f"No row of {task.name}'s {name} split is left after encoding at max_length={max_length}: "
                f"{'; '.join(said) or 'too little text'}. Raise max_length or give more rows."
            )
        done[name] = _dataset(encoded)
        notes += [f"{name}: {note}" for note in said]
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    return Encoded(**done, collator=Collator(pad), notes=tuple(notes))


def _limited(rows: list[Row], split: str, limit: Mapping[str, int], seed: int) -> list[Row]:
    count = limit.get(split)
    if count is None or count >= len(rows):
        return rows
    if count < 1:
        raise LamellaError(f"limit of {count} rows for {split}: use at least 1, or leave the split out of the limit.")
    order = random.Random(seed if split == "train" else _EVALUATION_SEED)
    return [rows[index] for index in sorted(order.sample(range(len(rows)), count))]


def _dataset(rows: list[Row]) -> Dataset:
    from datasets import Dataset

    for row in rows:
        ids = row["input_ids"]
        row["length"] = max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    return Dataset.from_dict({column: [row[column] for row in rows] for column in rows[0]})


@dataclass(frozen=True)
class _Encoder:
    """The settings that every row of a task shares."""

    task: Task
    tokenizer: Any
    max_length: int
    packing: bool
    decoder: bool | None

    def split(self, rows: list[Row], *, evaluation: bool) -> tuple[list[Row], list[str]]:
        """Encoded rows and what was cut or dropped."""
        kind = self.task.kind
        if kind in ("classification", "pair-classification", "regression"):
            return self._labelled(rows)
        if kind == "multiple-choice":
            as_decoder = self.tokenizer.mask_token is None if self.decoder is None else self.decoder
            return self._options(rows, evaluation) if as_decoder else self._choices(rows)
        if kind == "seq2seq":
            if self.decoder:
                return self._completions(
                    [prompt_pieces(f"{row['source']}\n", row["target"], self.tokenizer) for row in rows]
                )
            return self._seq2seq(rows)
        if "messages" in rows[0]:
            return self._completions([message_pieces(row["messages"], self.tokenizer) for row in rows])
        if "prompt" in rows[0]:
            return self._completions([prompt_pieces(row["prompt"], row["completion"], self.tokenizer) for row in rows])
        return self._prose(rows)

    def _tokens(self, *texts: list[str]) -> list[Row]:
        """Token rows with every column the model takes."""
        columns = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=True)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _full(self, rows: list[Row]) -> list[str]:
        full = sum(len(row["input_ids"]) >= self.max_length for row in rows)
        return [f"{full:,} of {len(rows):,} rows fill all {self.max_length} tokens; longer text is cut"] if full else []

    def _labelled(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        columns = [column for column in ("text", "text1", "text2") if column in rows[0]]
        encoded = self._tokens(*([row[column] for row in rows] for column in columns))
        for made, row in zip(encoded, rows, strict=True):
            made["labels"] = row["label"]
        return encoded, self._full(encoded)

    def _choices(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        """One row holds C sequences; the head scores each and picks one."""
        sizes = {len(row["choices"]) for row in rows}
        if len(sizes) > 1:
            raise LamellaError(
                f"Rows of {self.task.name} have {min(sizes)} to {max(sizes)} choices; an encoder's multiple-choice "
                "head compares the same number in every row of a batch. Use a decoder, which scores options one by one."
            )
        size = sizes.pop()
        questions = [row["question"] for row in rows for _ in range(size)]
        flat = self._tokens(questions, [choice for row in rows for choice in row["choices"]])
        encoded = []
        for index, row in enumerate(rows):
            options = flat[index * size : (index + 1) * size]
            encoded.append({column: [option[column] for option in options] for column in options[0]})
            encoded[-1]["labels"] = row["label"]
        return encoded, self._full(flat)

    def _options(self, rows: list[Row], evaluation: bool) -> tuple[list[Row], list[str]]:
        """Options as completions of the question: the right one in training, each one in evaluation."""
        pieces, facts = [], []
        for index, row in enumerate(rows):
            for choice, text in enumerate(row["choices"]):
                if evaluation or choice == row["label"]:
                    pieces.append(prompt_pieces(f"{row['question']}\nAnswer:", f" {text}", self.tokenizer))
                    facts.append({"row": index, "choice": choice, "answer": row["label"]})
        encoded, notes = self._completions(pieces)
        if evaluation:
            encoded = [{**made, **fact} for made, fact in zip(encoded, facts, strict=True)]
        return encoded, notes

    def _completions(self, pieces: list[list[Piece]]) -> tuple[list[Row], list[str]]:
        made = [cut_pieces(row, self.max_length) for row in pieces]
        kept = [row for row in made if any(label >= 0 for label in row["labels"])]
        notes = self._full(kept)
        if len(kept) < len(made):
            notes.append(f"{len(made) - len(kept):,} rows dropped: nothing to learn within {self.max_length} tokens")
        return kept, notes

    def _seq2seq(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        encoded = self._tokens([row["source"] for row in rows])
        targets = self.tokenizer(
            text_target=[row["target"] for row in rows], truncation=True, max_length=self.max_length
        )["input_ids"]
        for made, target in zip(encoded, targets, strict=True):
            made["labels"] = list(target)
        return encoded, self._full(encoded)

    def _prose(self, rows: list[Row]) -> tuple[list[Row], list[str]]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        documents = self.tokenizer([row["text"] for row in rows], return_attention_mask=False)["input_ids"]
        documents = [ids if ids[-1:] == end else [*ids, *end] for ids in documents]
        if self.packing:
            return packed_blocks(documents, self.max_length)
        kept = [ids[: self.max_length] for ids in documents if len(ids) > 1]
        cut = sum(max(0, len(ids) - self.max_length) for ids in documents)
        notes = [f"{cut:,} tokens beyond the first {self.max_length} of a text cut (packing keeps them)"] if cut else []
        return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)} for ids in kept], notes
