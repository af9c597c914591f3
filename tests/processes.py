"""Processes that have imported lamella and done nothing, forked from one that the tests of a worker share.

An interpreter that imports torch and transformers takes seconds of its own. A test that needs a process and not the
imports takes one of these.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

SECONDS = 240


def fresh_processes(*modules: str) -> ForkServerContext:
    """Processes that have imported these modules and done nothing: a kill then falls into work, not into imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def run_fresh(processes: ForkServerContext, work: Callable[..., None], *given: Any) -> None:
    """``work(*given)`` in a process of its own, which comes to its end."""
    _run([processes.Process(target=work, args=given)])


def run_on_two(processes: ForkServerContext, work: Callable[..., None], *given: Any) -> None:
    """``work(*given)`` in two processes, told what torchrun tells those that it starts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    _run([processes.Process(target=_as_rank, args=(rank, port, work, given)) for rank in range(2)])


def _as_rank(rank: int, port: int, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update({"MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true"})
    work(*given)


def _run(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)
