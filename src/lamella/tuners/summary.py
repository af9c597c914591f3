"""What an injection did, in words and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from lamella.backbones import Stack


@dataclass(frozen=True)
class Summary:
    """Which blocks got how many experts, what was skipped and why, and what trains.

    Attributes:
        method: the method's name.
        adapter: the adapter's name.
        stacks: the stacks of blocks.
        experts: experts per block, by stack name.
        top_k: experts used per token and block, by stack name.
        modules: adapted modules per block, by stack name.
        skipped: modules that matched the targets but were left alone, each with the reason.
        notes: settings that were adjusted, each with the reason.
        trainable: trainable parameters of the adapter, without ``modules_to_save``.
        unit: what each decision is for.
    """

    method: str
    adapter: str
    stacks: tuple[Stack, ...]
    experts: dict[str, list[int]]
    top_k: dict[str, list[int]]
    modules: dict[str, list[int]]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    trainable: int
    unit: str = "token"

    def __str__(self) -> str:
        lines = [f"{self.method} adapter {self.adapter!r}: {self.trainable:,} trainable parameters"]
        for stack in self.stacks:
            lines += [
                f"  {stack.name} ({stack.role}: {stack.evidence}; {stack.depth} blocks, found by {stack.found_by})",
                f"    experts per block: {_runs(self.experts[stack.name])}",
                f"    {f'used per {self.unit}:':<19}{_runs(self.top_k[stack.name])}",
                f"    adapted modules:   {_runs(self.modules[stack.name])}",
            ]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _runs(values: Sequence[int]) -> str:
    """``2 2 4`` as ``2x2 4``: equal neighbours are counted."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return " ".join(f"{value}" if count == 1 else f"{value}(x{count})" for value, count in runs)
