"""Token batches from any task or file, in the order of the text, one document a row."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lamella.data import Task, encode, load_task
from lamella.data.assets import sha256_of
from lamella.data.collating import IGNORED
from lamella.data.columns import Table, read_columns
from lamella.data.files import SUFFIXES, read_rows
from lamella.data.splitting import build_task
from lamella.data.task import Row, TaskKind
from lamella.errors import LamellaError


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
    """

    origin: str
    notes: tuple[str, ...]
    rows: Any = field(repr=False)
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]] = field(repr=False)
    batch_size: int
    writes: bool

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
            rows as in ``file:PATH``, all of them and not split.
        tokenizer: of the model.
        split: of a task.
        max_length: most tokens of a document; what is beyond is cut off.
        batch_size: documents of a batch.
        limit: documents used, a fixed sample in the order of the text; None for all.
        encoder_decoder: whether the model reads one text and writes another: batches have labels then, as in training
            (the target of seq2seq rows, prose itself); a text with a class has itself.

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
    )


def _only(source: Task | str | Path, split: str) -> Task:
    """The source as a task of one split, which encoding knows as train."""
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".txt", *SUFFIXES))):
        return _file(Path(source).expanduser())
    task = source if isinstance(source, Task) else load_task(source)
    if split not in task.splits:
        raise LamellaError(f"{task.name} has no split {split!r}; it has {', '.join(task.splits)}.")
    return replace(task, name=f"{task.name} ({split})", splits={"train": task.splits[split]})


def _file(path: Path) -> Task:
    if path.suffix == ".txt":
        kind: TaskKind = "causal-lm"
        rows: list[Row] = [{"text": text} for text in _paragraphs(path)]
        names: tuple[str, ...] = ()
    else:
        kind, splits, names, _ = read_columns({"train": Table(path.name, read_rows(path))})
        rows = splits["train"]
    source = f"{path.name} sha256 {sha256_of(path)[:16]}"
    return build_task(path.name, kind, {"train": rows}, label_names=names, source=source, licence="not stated")


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
