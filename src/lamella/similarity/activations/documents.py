"""The documents of a stream of batches, counted and hashed, without those that a capture has taken in before."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import LamellaError
from lamella.similarity.activations.keys import hashed
from lamella.similarity.activations.manifest import Manifest

Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one batch, one a row.

    Attributes:
        inputs: what the model is called with.
        rows: which document of the text each one is, int64 ``(batch,)``.
        number: which batch of the stream it is, from 0.
    """

    inputs: dict[str, Any]
    rows: Tensor
    number: int

    @classmethod
    def of(cls, batch: Batch, number: int, first: int) -> "Documents":
        """A batch as it comes; its rows are counted on from ``first`` where it does not say them itself.

        Raises:
            LamellaError: no token ids, not one document a row, or ``rows`` that do not name the documents apart.
        """
        inputs = dict(batch)
        ids, rows = inputs.get("input_ids"), inputs.pop("rows", None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            has = ", ".join(f"{name} {tuple(v.shape)}" for name, v in inputs.items() if isinstance(v, Tensor))
            raise LamellaError(
                f"Batch {number} has no input_ids of shape (documents, tokens), which a capture reads; it has "
                f"{has or 'no tensors'}."
            )
        if rows is None:
            rows = torch.arange(first, first + len(ids))
        elif rows.shape != ids.shape[:1] or len(rows.unique()) < len(rows):
            raise LamellaError(f"The rows of batch {number} do not give each of its {len(ids)} documents one number.")
        return cls(inputs, rows.cpu().long(), number)

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int | None = None) -> "Documents":
        """Some of them."""
        count = len(self)
        inputs = {
            name: value[start:stop] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
            for name, value in self.inputs.items()
        }
        return Documents(inputs, self.rows[start:stop], self.number)

    @property
    def _real(self) -> Tensor:
        """Which tokens are real, ``(batch, tokens)``."""
        mask = self.inputs.get("attention_mask")
        return torch.ones_like(self.inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return int(self._real.sum())

    @property
    def text(self) -> int:
        """A hash of each document's ids and row, added up: the same in batches of any size and padding."""
        real = self._real
        words = hashed(self.rows[:, None].to(real.device), real.cumsum(1) - 1, self.inputs["input_ids"])
        return int(words[real].sum())


class _Numbers:
    """The numbers of the documents that came, without those of an unbroken beginning: little memory in most orders."""

    def __init__(self) -> None:
        self._below = 0
        self._beyond: set[int] = set()

    def take(self, documents: Documents) -> None:
        """Takes up the numbers of a batch.

        Raises:
            LamellaError: one of them came before: its tokens would have the keys of others, and be drawn with them.
        """
        for row in documents.rows.tolist():
            if 0 <= row < self._below or row in self._beyond:
                raise LamellaError(
                    f"Document {row} comes again in batch {documents.number}: the rows of the batches have to give "
                    "each document of the text a number of its own. Number them on, or leave the rows out."
                )
            self._beyond.add(row)
        while self._below in self._beyond:
            self._beyond.remove(self._below)
            self._below += 1


def added(text: int, more: int) -> int:
    """The sum of two hashes of text, as int64 wraps it."""
    return (text + more + (1 << 63)) % (1 << 64) - (1 << 63)


def unread(batches: Iterable[Batch], done: Manifest, folder: Path) -> Iterator[Documents]:
    """The documents after those that a capture has taken in, which are read over and compared.

    Raises:
        LamellaError: the documents taken in were others, the text ends before them, or a document comes twice.
    """
    seen = text = 0
    numbers = _Numbers()
    for number, batch in enumerate(batches):
        documents = Documents.of(batch, number, first=seen)
        numbers.take(documents)
        known = min(len(documents), done.rows_done - seen)
        if known > 0:
            text = added(text, documents.part(0, known).text)
            if seen + known == done.rows_done and text != done.text:
                raise LamellaError(
                    f"The capture in {folder} has taken in {done.rows_done:,} documents of hash {done.text}; the "
                    f"first {done.rows_done:,} documents given now have hash {text}. Give it the same text in the same "
                    "order, or capture into another folder."
                )
        seen += len(documents)
        if known < len(documents):
            yield documents.part(max(known, 0))
    if seen < done.rows_done:
        raise LamellaError(
            f"The capture in {folder} has taken in {done.rows_done:,} documents, but the text given now ends after "
            f"{seen:,}. Give it the same text, or capture into another folder."
        )
