"""What a step computes, counted instead of timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class BlockRuns:
    """How often a forward uses the blocks of a stack, per block of the stack.

    Attributes:
        rows: how often a sequence runs through a block.
        calls: how often a block is called, on however many sequences.
    """

    rows: float
    calls: float


def count_flops(step: Callable[[], None]) -> int:
    """Floating-point operations of the matrix products and attention of a step, a multiply-add counting as two."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        step()
    total: int = counter.get_total_flops()
    return total


def count_block_runs(forward: Callable[[], object], blocks: list[nn.Module], batch: int) -> BlockRuns:
    """Counts what a forward runs through the blocks of a stack.

    Args:
        forward: one forward.
        blocks: the blocks themselves, not what is wrapped around them.
        batch: its sequences.
    """
    rows: list[int] = []

    def note(_block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows.append(args[0].shape[0])

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return BlockRuns(sum(rows) / (len(blocks) * batch), len(rows) / len(blocks))


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _attention_backward(output: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    flops: int = sdpa_backward_flop_count(output, query, key, value)
    return flops


# torch counts attention on a GPU, but leaves it out on a CPU.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
