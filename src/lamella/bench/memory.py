"""What a step keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


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


def peak_megabytes(step: Callable[[], None]) -> float:
    """Megabytes that a step allocates on the CUDA device above what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
