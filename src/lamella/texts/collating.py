"""Batches from encoded rows: padded to the longest row, with an exact attention mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100  # label of a position without loss


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of the batch.

    Positions are masked by the attention mask of each row, never by comparing ids: the pad token may be the end token.
    Rows of a multiple-choice encoder (C sequences a row) become (B, C, T); all others (B, T).

    Attributes:
        pad_id: id written where `attention_mask` is 0.
    """

    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> Collator:
        """With the tokenizer's pad token, or its end token where it has none."""
        return cls(next(at for at in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if at is not None))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Model inputs and labels of a batch; other columns, such as `length`, are left out."""
        choices = len(rows[0]["input_ids"]) if isinstance(rows[0]["input_ids"][0], list) else 0
        batch = {}
        for column, filler in (("input_ids", self.pad_id), ("attention_mask", 0), ("token_type_ids", 0)):
            if column in rows[0]:
                values = [row[column] for row in rows]
                batch[column] = _padded([one for value in values for one in value] if choices else values, filler)
                if choices:
                    batch[column] = batch[column].view(len(rows), choices, -1)  # (B, C, T)
        labels = [row["labels"] for row in rows]
        batch["labels"] = _padded(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels)
        return batch


def _padded(sequences: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[filler] * (width - len(sequence))] for sequence in sequences])  # (B, T)
