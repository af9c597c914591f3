"""Processes that take the cells of a study, one after the other."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

from transformers import TrainerCallback

from lamella.errors import LamellaError
from lamella.lab.quiet import quiet_libraries
from lamella.lab.studies.grid import Cell
from lamella.lab.studies.rows import StudyFolder

_POLL_SECONDS = 0.5


def work(
    cells: Sequence[Cell],
    folder: StudyFolder,
    callbacks: Sequence[TrainerCallback] = (),
    starting: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """Run every cell that has no row, until each has one or has failed; cells that others run are waited for."""
    left = list({cell.key: cell for cell in cells}.values())
    while left := [cell for cell in left if not folder.finished(cell.key) and folder.failure(cell.key) is None]:
        if not any(_take(cell, folder, callbacks, starting) for cell in left):
            time.sleep(_POLL_SECONDS)


def _take(
    cell: Cell, folder: StudyFolder, callbacks: Sequence[TrainerCallback], starting: Callable[[Cell], None]
) -> bool:
    with folder.claim(cell.key) as claimed:
        # another process may have finished it since the list was made
        if not claimed or folder.finished(cell.key) or folder.failure(cell.key) is not None:
            return False
        starting(cell)
        try:
            folder.train(cell, callbacks)
        except LamellaError as error:
            folder.fail(cell, str(error))
        return True


def work_in_processes(
    cells: Sequence[Cell], folder: StudyFolder, jobs: int, finished: Callable[[Cell], None] = lambda cell: None
) -> None:
    """`work` in ``jobs`` fresh processes; they end when this one does, however it ends.

    Raises:
        LamellaError: a process died of something that is no `LamellaError`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each process has one core
    context = multiprocessing.get_context("spawn")  # a forked torch keeps locks and threads that no longer exist
    processes: list[BaseProcess] = [context.Process(target=_worker, args=(list(cells), folder)) for _ in range(jobs)]
    waiting = {cell.key: cell for cell in cells if not folder.finished(cell.key)}
    for process in processes:
        process.start()
    try:
        while waiting and any(process.is_alive() for process in processes):
            time.sleep(_POLL_SECONDS)
            for key in [key for key in waiting if folder.finished(key)]:
                finished(waiting.pop(key))
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
    if bad := [process.exitcode for process in processes if process.exitcode]:
        raise LamellaError(
            f"{len(bad)} of {jobs} processes ended with status {bad[0]} before the study was done (a negative "
            "one is a signal, -9 often a lack of memory). Finished cells are kept: run it again, with fewer --jobs."
        )


def _worker(cells: list[Cell], folder: StudyFolder) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()  # several processes share one terminal
    work(cells, folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
