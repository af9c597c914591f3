"""Prose as blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from lamella.lab.data.task import Row


def packed_blocks(documents: Sequence[Sequence[int]], block: int) -> tuple[list[Row], list[str]]:
    """Join documents end to end and cut blocks of exactly `block` tokens.

    A block may hold the end of one document and the start of the next, and attends across that border; each document
    closes with the end token where the tokenizer has one. The tokens after the last whole block are dropped.

    Args:
        documents: token ids of each document.
        block: tokens of a block.

    Returns:
        Rows whose labels are their ids, and notes on what was dropped.
    """
    stream = list(chain.from_iterable(documents))
    whole = len(stream) // block * block
    rows: list[Row] = [
        {"input_ids": ids, "attention_mask": [1] * block, "labels": list(ids)}
        for ids in (stream[start : start + block] for start in range(0, whole, block))
    ]
    left = len(stream) - whole
    notes = [f"{len(documents):,} texts packed into {len(rows):,} blocks of {block} tokens"]
    if left:
        notes.append(f"the last {left:,} of {len(stream):,} tokens dropped: less than a block")
    return rows, notes
