"""Kills work at random moments, again and again, and compares what it leaves with what it leaves when nothing kills it.

The work goes on where it was killed; when it comes to its end before the kill, other work of the same kind is begun.
"""

import math
import os
import random
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pandas as pd
import torch


def kill_at_random(
    processes: ForkServerContext,
    work: Callable[[Any], None],
    place: Callable[[Path], Any],
    folder: Path,
    left: Callable[[Any], Any],
    kills: int,
    seed: int,
) -> tuple[int, int]:
    """Kills ``work(place(a folder))`` so many times; each that ends must have ``left`` what it leaves unharmed.

    Returns:
        How many kills there were, and how many came to their end and were compared.
    """
    whole = place(folder / "whole")
    status, seconds = _run(processes, work, whole)
    assert status == 0
    expected = left(whole)

    generator = random.Random(seed)
    killed, ends = 0, 0
    here = place(folder / "killed0")
    while killed < kills:
        status, _ = _run(processes, work, here, seconds * generator.random())
        if status == -signal.SIGKILL:
            killed += 1
            continue
        assert status == 0
        assert_same(left(here), expected)
        ends += 1
        here = place(folder / f"killed{ends}")
    assert _run(processes, work, here)[0] == 0
    assert_same(left(here), expected)
    return killed, ends + 1


def _run(
    processes: ForkServerContext, work: Callable[[Any], None], here: Any, limit: float = math.inf
) -> tuple[int | None, float]:
    """Exit status and CPU seconds of the work, killed at the limit: how busy the machine is changes nothing."""
    process = processes.Process(target=work, args=(here,))
    process.start()
    spent = 0.0
    while process.exitcode is None:
        spent = _cpu_seconds(process.pid) or spent
        if spent >= limit:
            os.kill(process.pid, signal.SIGKILL)
            break
        process.join(0.003)
    process.join()
    return process.exitcode, spent


def _cpu_seconds(pid: int | None) -> float | None:
    """Of a process, in user and system mode; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def assert_same(one: Any, other: Any) -> None:
    """Tables, tensors and plain values alike, to the last bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other
