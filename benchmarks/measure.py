"""The one way of measuring: every method of a case in one interleaved run, with what it computes and keeps beside."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.equality import Equality
from benchmarks.record import BenchSettings, Case, Method
from lamella.lab.studies.measuring import clock_for, ratio, time_rounds, using_threads

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Timed:
    """Something to be timed.

    Attributes:
        what: what it is, in words.
        step: what is timed.
        parameters: how many of them train.
        kept_mb: measures the activations that the step keeps for its backward pass, in 1e6 bytes.
        block_runs: how often a sequence runs through a block, per block of the stack; operations are then counted too.
        live_peak: whether the peak of memory is measured on a CPU as well, which takes long.
    """

    what: str
    step: Callable[[], object]
    parameters: int = 0
    kept_mb: Callable[[], float] = lambda: 0.0
    block_runs: float | None = None
    live_peak: bool = False


def measure_case(
    name: str,
    methods: Mapping[str, Timed],
    pairs: Sequence[tuple[str, str]],
    equality: Equality,
    settings: BenchSettings,
    *,
    rounds: int | None = None,
    threads: int | None = None,
) -> Case:
    """One interleaved run.

    Args:
        name: of the case.
        methods: what is timed, by name.
        pairs: which times are divided by which.
        equality: how nearly the methods agreed, compared before.
        settings: rounds, threads and device.
        rounds, threads: of this case, where it has others.
    """
    clock = clock_for(threads or settings.threads, settings.device)
    kept = {method: timed.kept_mb() for method, timed in methods.items()}
    flops = {method: count_flops(timed.step) for method, timed in methods.items() if timed.block_runs is not None}
    steps = {method: timed.step for method, timed in methods.items()}
    with using_threads(threads or settings.threads):
        seconds = time_rounds(steps, rounds or settings.rounds, clock)
    measured = [
        Method(
            name=method, what=timed.what, trainable_parameters=timed.parameters, seconds=seconds[method],
            median_seconds=statistics.median(seconds[method]), kept_mb=kept[method],
            peak_mb=_peak_megabytes(timed, settings.device), flops=flops.get(method), block_runs=timed.block_runs,
        )
        for method, timed in methods.items()
    ]  # fmt: skip
    ratios = [ratio(seconds, method, over) for method, over in pairs]
    case = Case(name=name, methods=measured, equality=equality, ratios=ratios)
    return case if threads is None else case.model_copy(update={"threads": threads, "clock": clock})


def _peak_megabytes(timed: Timed, device: str) -> float | None:
    if device == "cpu":
        return peak_live_megabytes(timed.step) if timed.live_peak else None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attention of a step, a multiply-add counting as two."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        step()
    total: int = counter.get_total_flops()
    return total


def count_block_runs(forward: Callable[[], object], blocks: Sequence[nn.Module], batch: int) -> tuple[float, float]:
    """How often a forward of ``batch`` sequences runs one through a block, and calls a block, per block of the stack.

    Args:
        forward: one forward.
        blocks: the blocks themselves, not what is wrapped around them.
        batch: its sequences.
    """
    rows: list[int] = []

    def note(_block: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(args[0].shape[0])

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return sum(rows) / (len(blocks) * batch), len(rows) / len(blocks)


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


class _LiveStorages(TorchDispatchMode):
    """Watches what the operations of a step put into memory; ``peak`` is the most bytes alive after any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if (address := tensor.untyped_storage()._cdata) not in self._alive:
                self._given.add(address)
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {address: one for address, one in self._alive.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return output


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def peak_live_megabytes(step: Callable[[], object]) -> float:
    """Megabytes of the most tensors that a step has alive at once on the CPU, without what was there before it.

    Counted after every operation: what an operation needs only while it runs is not in it.
    """
    with _LiveStorages() as live:
        step()
    return live.peak / 1e6
