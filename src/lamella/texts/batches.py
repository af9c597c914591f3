"""Batches of tokens from texts, rows, files and tasks, in the order of the text, one document a row."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.files import sha256_of
from lamella.texts.collating import IGNORED, Collator
from lamella.texts.encoding import RowEncoder
from lamella.texts.files import SUFFIXES, read_rows
from lamella.texts.rows import Row, Table, TaskKind, hold_out, input_columns, read_columns, sample_indices

_TEST = 5  # one document in so many is for tests, where nothing says which


class TextTask(Protocol):
    """Rows that are split already, as the laboratory's `load_task` gives them."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> TaskKind: ...
    @property
    def splits(self) -> Mapping[str, Any]: ...
    @property
    def label_names(self) -> tuple[str, ...]: ...
    @property
    def source(self) -> str: ...


@dataclass(frozen=True)
class TextBatches:
    """Batches of tokens, made anew each time they are gone through.

    Attributes:
        origin: what the text is, a sentence.
        notes: what encoding cut or dropped.
        rows: the encoded documents.
        collator: pads them.
        batch_size: documents of a batch.
        writes: whether batches have labels, for a model that reads one text and writes another.
        label_tokens: of such a model that answers with one token, ``<|NAME|>`` for each label of the task; labels are
            these then. Empty otherwise.
    """

    origin: str
    notes: tuple[str, ...]
    rows: Sequence[Row] = field(repr=False)
    collator: Collator = field(repr=False)
    batch_size: int
    writes: bool
    label_tokens: tuple[int, ...] = ()

    @property
    def documents(self) -> int:
        """How many documents there are, one a row."""
        return len(self.rows)

    def shuffled(self, seed: int = 0) -> "TextBatches":
        """The same documents in an order drawn by the seed, so that the first ones stand for all."""
        order = torch.randperm(self.documents, generator=torch.Generator().manual_seed(seed))
        return replace(self, rows=[self.rows[at] for at in order.tolist()])

    def __len__(self) -> int:
        return -(-self.documents // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.documents, self.batch_size):
            batch = self.collator(self.rows[start : start + self.batch_size])
            labels = batch.pop("labels")
            if self.writes:
                ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
                if self.label_tokens:
                    ids = torch.tensor(self.label_tokens)[labels][:, None]  # (batch, 1)
                batch["labels"] = labels if labels.dim() == 2 else ids
            yield batch


def text_batches(
    source: TextTask | str | Path | Iterable[str] | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    split: str | None = None,
    max_length: int = 256,
    batch_size: int = 8,
    limit: int | None = None,
    *,
    encoder_decoder: bool = False,
) -> TextBatches:
    """Texts as batches of tokens, padded on the right.

    Rows are encoded as in training: a pair as a pair, a question with its right answer, chat by the tokenizer's
    template.

    Args:
        source: a file (.txt, a document between blank lines; or rows in JSON lines, CSV or Parquet); texts; rows, with
            columns as in such a file; or a task, as ``load_task`` of the laboratory loads one by name.
        tokenizer: of the model.
        split: of a task, "train" where None. Everything else has "test", a fifth of its documents, chosen by their
            hash (those with the same text together), "train", the others, and "all"; None is "train" for a file and
            "all" for texts and rows.
        max_length: most tokens of a document; what is beyond is cut off.
        batch_size: documents of a batch.
        limit: documents used, a fixed sample in the order of the text; None for all.
        encoder_decoder: whether the model reads one text and writes another: batches have labels then, as in training
            (the target of seq2seq rows, prose itself); a text with a class has the class's token where the tokenizer
            has ``<|NAME|>`` for every class, and otherwise itself.

    Raises:
        LamellaError: no such source or split, or rows that cannot be used.
    """
    if batch_size < 1:
        raise LamellaError(f"batch_size={batch_size}: a batch has at least one document.")
    if limit is not None and limit < 1:
        raise LamellaError(f"limit={limit}: use at least one document.")
    documents = _documents(source, split)
    as_decoder = not encoder_decoder or documents.kind == "multiple-choice"  # a question with its answer, in one row
    encode = RowEncoder(documents.kind, documents.name, tokenizer, max_length, decoder=as_decoder)
    rows = [documents.rows[at] for at in sample_indices(len(documents.rows), limit)]
    encoded, notes = encode(rows, documents.split)
    called = f"{documents.name} ({documents.split})"
    return TextBatches(
        origin=f"{len(encoded):,} documents of {called}, at most {max_length} tokens each ({documents.source})",
        notes=tuple(notes),
        rows=encoded,
        collator=Collator.of(tokenizer),
        batch_size=batch_size,
        writes=encoder_decoder,
        label_tokens=_label_tokens(documents.label_names, tokenizer) if encoder_decoder else (),
    )


@dataclass(frozen=True)
class _Documents:
    """One split of a source."""

    name: str
    source: str
    split: str
    kind: TaskKind
    rows: list[Row]
    label_names: tuple[str, ...]


def _documents(source: Any, split: str | None) -> _Documents:
    if isinstance(source, str | Path):
        return _of_file(source, split or "train")
    if not hasattr(source, "splits"):
        return _of_rows("the texts given", "given in memory", list(source), split or "all")
    split = split or "train"
    if split not in source.splits:
        raise LamellaError(f"{source.name} has no split {split!r}; it has {', '.join(source.splits)}.")
    rows = [dict(row) for row in source.splits[split]]
    return _Documents(source.name, source.source, split, source.kind, rows, source.label_names)


def _of_file(source: str | Path, split: str) -> _Documents:
    path = Path(source).expanduser()
    if isinstance(source, str) and not path.is_file() and not source.endswith(SUFFIXES):
        raise LamellaError(
            f"There is no file {source!r}. Give the path of a {', '.join(SUFFIXES)} file, texts, or a task: "
            f"text_batches(lamella.lab.data.load_task({source!r}), ...)."
        )
    rows = read_rows(path)
    return _of_rows(path.name, f"{path.name} sha256 {sha256_of(path)[:16]}", rows, split)


def _of_rows(name: str, source: str, given: list[Any], split: str) -> _Documents:
    rows: list[Row] = [{"text": one} if isinstance(one, str) else dict(one) for one in given]
    if not rows:
        raise LamellaError(f"There is no text in {name}.")
    kind, tables, label_names, _ = read_columns({"train": Table(name, rows)})
    rows = _side(name, kind, tables["train"], split)
    if not (kind == "causal-lm" and "text" in rows[0]):  # rows are often sorted by their label; prose has an order
        rows = random.Random(0).sample(rows, len(rows))
    return _Documents(name, source, split, kind, rows, label_names)


def _side(name: str, kind: TaskKind, rows: list[Row], split: str) -> list[Row]:
    """The rows that are of a split; rows that ask the same are on one side."""
    if split == "all":
        return rows
    inputs = input_columns(kind, set(rows[0]))
    train, test = hold_out(rows, len(rows) // _TEST, lambda row: json.dumps([row[column] for column in inputs]))
    sides = {"train": train, "test": test}
    if split not in sides:
        raise LamellaError(f"{name} has no split {split!r}; it has train, test, all.")
    if not sides[split]:
        raise LamellaError(
            f"The {len(rows)} documents of {name} are too few for a split {split!r}. Give more of them, or take the "
            "split all."
        )
    return sides[split]


def _label_tokens(names: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The tokens that stand for the labels; none unless every label has one."""
    known = tokenizer.get_vocab()
    tokens = [known.get(f"<|{name}|>") for name in names]
    return tuple(token for token in tokens if token is not None) if None not in tokens else ()
