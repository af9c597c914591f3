"""How much memory a run took at its peak."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Forget earlier peaks of this process, where the system can (Linux, CUDA), so that runs in one process compare."""
    if _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")  # 5 resets VmHWM, the high-water mark of resident memory
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Peak in bytes: of the GPU's allocations where there is one, else of this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
