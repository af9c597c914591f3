"""Documents as batches of any size and padding, and what a capture holds, to compare."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tests.tiny_moe import PAD, VOCAB
from torch import Tensor

from lamella.similarity.activations import Capture


def documents(count: int = 7, seed: int = 0, longest: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def batches(
    texts: Sequence[Tensor], size: int = 3, padding: str = "right", rows: Sequence[int] | None = None, wider: int = 0
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        width = max(map(len, part)) + wider
        ids = torch.full((len(part), width), PAD)
        for row, text in enumerate(part):
            ids[row, slice(0, len(text)) if padding == "right" else slice(width - len(text), width)] = text
        batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        if rows is not None:
            batch["rows"] = torch.tensor(rows[start : start + size])
        yield batch


def held(capture: Capture) -> dict[str, Tensor]:
    """All samples and counts of a capture."""
    names = ("keys", "rows", "positions", "inputs")
    parts = {f"{name} {at}": getattr(capture, name)(*at) for at in capture.experts for name in names}
    tables = {"routing": capture.routing, "coactivation": capture.coactivation}
    return parts | {name: torch.tensor(table.to_numpy(dtype=float)) for name, table in tables.items()}


def assert_equal(actual: Capture, expected: Capture) -> None:
    """The same samples and counts, bit for bit."""
    mine, theirs = held(actual), held(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def assert_same_samples(actual: Capture, expected: Capture) -> None:
    """The same tokens and counts; what they are, as close as other shapes of the same sums come."""
    mine, theirs = held(actual), held(expected)
    for name, tensor in theirs.items():
        if name.startswith("inputs"):
            torch.testing.assert_close(mine[name], tensor)
        else:
            assert torch.equal(mine[name], tensor), name


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
