"""Ratios of times that survive a busy machine, from interleaved rounds, and the memory kept for a backward pass."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Clock = Literal["process CPU time", "wall time", "wall time, device synchronised"]


class Ratio(BaseModel):
    """How the times of one method relate to those of another in the same rounds; in files, ``method`` is called "arm".

    Attributes:
        method: the one measured.
        over: the one it is compared with.
        median: median over the rounds of the ratio within a round.
        quartiles: first and third quartile of those ratios.
        minima: ratio of the two methods' fastest rounds.
    """

    model_config = ConfigDict(populate_by_name=True)

    method: str = Field(validation_alias="arm", serialization_alias="arm")
    over: str
    median: float
    quartiles: tuple[float, float]
    minima: float


def clock_for(threads: int, device: str) -> Clock:
    """Which time is measured: other processes do not count in a single thread's CPU time."""
    if device != "cpu":
        return "wall time, device synchronised"
    return "process CPU time" if threads == 1 else "wall time"


def time_rounds(steps: Mapping[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each method's step in each round, after a round that is not counted.

    All methods run in every round, and each round starts with another method.
    """
    names = list(steps)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    freeze = gc.get_freeze_count() == 0  # a caller's own is not undone
    if freeze:
        gc.freeze()  # what is there already need not be looked through between any two steps
    try:
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                gc.collect()  # else one method pays for what another left behind
                before = _now(clock)
                steps[name]()
                seconds[name].append(_now(clock) - before)
    finally:
        if freeze:
            gc.unfreeze()
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], method: str, over: str) -> Ratio:
    """The ratio of two methods of one interleaved run."""
    per_round = [a / b for a, b in zip(seconds[method], seconds[over], strict=True)]
    first, median, third = statistics.quantiles(per_round, n=4, method="inclusive")
    minima = min(seconds[method]) / min(seconds[over])
    return Ratio(method=method, over=over, median=median, quartiles=(first, third), minima=minima)


def kept_megabytes(forward: Callable[[], Tensor], given: Iterable[Tensor]) -> float:
    """Megabytes (1e6 bytes) of the storages that a forward saves for its backward pass, each counted once.

    Args:
        forward: runs the forward and returns the loss.
        given: parameters, buffers and inputs, which are there anyway and do not count.
    """
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the graph, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()
    del graph
    return sum(kept.values()) / 1e6


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Torch's CPU threads, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _now(clock: Clock) -> float:
    if clock == "process CPU time":
        return time.process_time()
    if clock == "wall time, device synchronised":
        torch.cuda.synchronize()
    return time.perf_counter()
