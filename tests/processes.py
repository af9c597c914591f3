"""Processes that have imported lamella and done nothing, forked from one that the tests of a worker share.

An interpreter that imports torch and transformers takes seconds of its own. A test that needs a process and not the
imports takes one of these.
"""

import atexit
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SECONDS = 240


def serve_forks() -> None:
    """Forks the server of fresh processes from this one, which has imported everything and done nothing yet.

    A server that is an interpreter of its own would import it all again.
    """
    spawned, util.spawnv_passfds = util.spawnv_passfds, _forked
    try:
        forkserver._forkserver.ensure_running()
    finally:
        util.spawnv_passfds = spawned


def _forked(_: bytes, words: Sequence[str], descriptors: Sequence[int]) -> int:
    """In place of an interpreter that is given these words, the last of which is its program."""
    if pid := os.fork():
        return pid
    try:
        atexit._clear()
        forkserver._forkserver._lock = threading.Lock()
        for opened in Path("/proc/self/fd").iterdir():
            if int(opened.name) > 2 and int(opened.name) not in descriptors:
                _close_if_pipe(opened)
        exec(words[-1])
    finally:
        os._exit(0)


def _close_if_pipe(opened: Path) -> None:
    """Those who read the other end would wait for this process too."""
    with suppress(OSError):  # that of the listing is closed
        if str(opened.readlink()).startswith(("pipe:", "socket:")):
            os.close(int(opened.name))


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
