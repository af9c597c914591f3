"""Token batches from any task or file, in the order of the text, one document a row."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.lab.data import Task, encode, load_task
from lamella.lab.data.assets import sha256_of
from lamella.lab.data.collating import IGNORED
from lamella.lab.data.columns import Table, read_columns
from lamella.lab.data.files import SUFFIXES, read_rows
from lamella.lab.data.splitting import build_task, hold_out
from lamella.lab.data.task import Row, TaskKind, input_columns

_TEST = 5  # one document of a file in so many is for tests


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
    rows: Any = field(repr=False)
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] = field(repr=False)
    batch_size: int
    writes: bool
    label_tokens: tuple[int, ...] = ()

    @property
    def documents(self) -> int:
        """How many documents there are, one a row."""
        return len(self.rows)

    def __len__(self) -> int:
        return -(-self.documents // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.documents, self.batch_size):
            rows = self.rows.select(range(start, min(start + self.batch_size, self.documents)))
            batch = self.collator(list(rows))
            labels = batch.pop("labels")
            if self.writes:
                ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
                if self.label_tokens:
                    ids = torch.tensor(self.label_tokens)[labels][:, None]  # (batch, 1)
                batch["labels"] = labels if labels.dim() == 2 else ids
            yield batch


def text_batches(
    source: Task | str | Path,
    tokenizer: Any,
    split: str = "train",
    max_length: int = 256,
    batch_size: int = 8,
    limit: int | None = None,
    *,
    encoder_decoder: bool = False,
) -> TextBatches:
    """The texts of a task or a file as batches of tokens, padded on the right.

    A task is encoded as in training: a pair as a pair, a question with its right answer, chat by the tokenizer's
    template.

    Args:
        source: a task, the name of one as ``load_task`` takes it, or a file: .txt, a document between blank lines, or
            rows as in ``file:PATH``.
        tokenizer: of the model.
        split: of the task. A file has "test", a fifth of its documents, chosen by their hash (those with
            the same text together), "train", the others, and "all".
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
    task = _only(source, split)
    as_decoder = not encoder_decoder or task.kind == "multiple-choice"  # a question with its answer, in one row
    encoded = encode(
        task,
        tokenizer,
        max_length=max_length,
        limit=None if limit is None else {"train": limit},
        decoder=as_decoder,
    )
    assert encoded.train is not None
    return TextBatches(
        origin=f"{len(encoded.train):,} documents of {task.name}, at most {max_length} tokens each ({task.source})",
        notes=encoded.notes,
        rows=encoded.train,
        collator=encoded.collator,
        batch_size=batch_size,
        writes=encoder_decoder,
        label_tokens=_label_tokens(task, tokenizer) if encoder_decoder else (),
    )


def _label_tokens(task: Task, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that stand for the labels; none unless every label has one."""
    known = tokenizer.get_vocab()
    tokens = [known.get(f"<|{name}|>") for name in task.label_names]
    return tuple(token for token in tokens if token is not None) if None not in tokens else ()


def _only(source: Task | str | Path, split: str) -> Task:
    """The source as a task of one split, which encoding knows as train."""
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".txt", *SUFFIXES))):
        return _file(Path(source).expanduser(), split)
    task = source if isinstance(source, Task) else load_task(source)
    if split not in task.splits:
        raise LamellaError(f"{task.name} has no split {split!r}; it has {', '.join(task.splits)}.")
    return replace(task, name=f"{task.name} ({split})", splits={"train": task.splits[split]})


def _file(path: Path, split: str) -> Task:
    if path.suffix == ".txt":
        kind: TaskKind = "causal-lm"
        rows: list[Row] = [{"text": text} for text in _paragraphs(path)]
        names: tuple[str, ...] = ()
    else:
        kind, splits, names, _ = read_columns({"train": Table(path.name, read_rows(path))})
        rows = splits["train"]
    source = f"{path.name} sha256 {sha256_of(path)[:16]}"
    name, rows = f"{path.name} ({split})", _side(path.name, kind, rows, split)
    return build_task(name, kind, {"train": rows}, label_names=names, source=source, licence="not stated")


def _side(name: str, kind: TaskKind, rows: list[Row], split: str) -> list[Row]:
    """The rows of a file that are of a split; rows that ask the same are on one side."""
    if split == "all":
        return rows
    inputs = input_columns(kind, set(rows[0]))
    train, test = hold_out(rows, len(rows) // _TEST, lambda row: json.dumps([row[column] for column in inputs]))
    sides = {"train": train, "test": test}
    if split not in sides:
        raise LamellaError(f"{name} has no split {split!r}; it has train, test, all.")
    if not sides[split]:
        raise LamellaError(
            f"The {len(rows)} documents of {name} are too few for a split {split!r} of their own. Give more of them, "
            "or take the split all."
        )
    return sides[split]


def _paragraphs(path: Path) -> list[str]:
    """The documents of a text file: what lies between blank lines."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LamellaError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    found = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not found:
        raise LamellaError(f"{path.name} has no text.")
    return found
