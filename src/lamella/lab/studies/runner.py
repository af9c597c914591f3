"""Who does the work of a study: this process, processes beside it, or the workers of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from typing import Any

from lamella.cluster import Cluster, WorkersDiedError, connected
from lamella.errors import LamellaError
from lamella.lab.quiet import quiet_libraries
from lamella.lab.studies.cells import Cell, Job, jobs_of
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.planning import seconds_left
from lamella.progress import Work, under_way, working

_POLL_SECONDS = 0.5
Told = Callable[[Job], None]


def run_cells(
    cells: Sequence[Cell],
    folder: StudyFolder,
    jobs: int = 1,
    ray: str | None = None,
    starting: Told = lambda job: None,
    finished: Told = lambda job: None,
    guesses: dict[tuple[Any, ...], float] | None = None,
) -> None:
    """Do all that these cells are made of and that has no row yet; whoever needs what failed fails too, and says so.

    Args:
        cells: of the study.
        folder: where they lie.
        jobs: processes, each with one thread; with one, this process works.
        ray: address of a Ray cluster whose workers see the folder under the same path, "auto" for the one on this
            machine, or "local"; in place of processes.
        starting: told each job before it is begun, where this process works.
        finished: told each job that was done.
        guesses: of a `plan` that was made before: what is left is then said by the times of alike jobs, and otherwise
            by the rate.

    Raises:
        LamellaError: processes cannot be kept alive, or no cluster answers.
    """
    work_list = jobs_of(cells)
    processes = min(jobs, len(work_list))

    def done() -> int:
        return sum(_settled(job, folder) for job in work_list)

    with working("running", len(work_list), "jobs", done()) as study:

        def reach() -> None:
            # how many workers a cluster has is not known here
            alone = None if guesses is None or ray is not None else seconds_left(work_list, folder, guesses)
            study.reach(done(), left=None if alone is None else alone / processes)

        def settled(job: Job) -> None:
            reach()
            if folder.finished(job.key):
                finished(job)

        reach()
        if ray is not None:
            work_on_ray(work_list, folder, ray, settled)
        elif jobs > 1:
            work_in_processes(work_list, folder, processes, settled)
        else:
            work(work_list, folder, starting, settled)


def work(
    jobs: Sequence[Job],
    folder: StudyFolder,
    starting: Told = lambda job: None,
    settled: Told = lambda job: None,
) -> None:
    """Do every job, until each has its row or has failed; what others are doing is waited for."""
    labels = {job.key: job.label for job in jobs}
    left = list(jobs)
    while left := [job for job in left if not _settled(job, folder)]:
        taken = False
        for job in left:
            if _ready(job, folder, labels) and _take(job, folder, starting):
                taken = True
                settled(job)
        if not taken and any(not _settled(job, folder) for job in left):
            time.sleep(_POLL_SECONDS)


def _settled(job: Job, folder: StudyFolder) -> bool:
    return folder.finished(job.key) or folder.failure(job.key) is not None


def _ready(job: Job, folder: StudyFolder, labels: dict[str, str]) -> bool:
    """Whether everything is there that a job needs; a job that needs what failed fails."""
    if failed := [key for key in job.needs if folder.failure(key) is not None]:
        folder.fail(job, f"It needs {labels.get(failed[0], failed[0])}, which could not be run.")
    return all(folder.finished(key) for key in job.needs)


def _take(job: Job, folder: StudyFolder, starting: Told) -> bool:
    with folder.claim(job.key) as claimed:
        # another process may have finished it since the list was made
        if not claimed or _settled(job, folder):
            return False
        starting(job)
        try:
            with working(job.label):
                folder.carry_out(job)
        except LamellaError as error:
            folder.fail(job, str(error))
        except Exception as error:  # the other cells go on; the run's log has the traceback
            first_line = (str(error).strip().splitlines() or [""])[0]
            folder.fail(job, f"{type(error).__name__}: {first_line}")
        return True


def work_in_processes(jobs: Sequence[Job], folder: StudyFolder, count: int, settled: Told = lambda job: None) -> None:
    """`work` in ``count`` fresh processes, which say how far they are; they end when this one does, however it ends.

    Another process takes the place of one that dies, and goes on with its job; a job over which two have died fails.

    Raises:
        LamellaError: processes die without a job.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each process has one core
    context = multiprocessing.get_context("spawn")  # a forked torch keeps locks and threads that no longer exist

    def begin() -> None:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(list(jobs), folder, there))
        with _keyboard_off():
            process.start()
        there.close()
        processes[process] = here

    processes: dict[BaseProcess, Connection] = {}
    told: dict[BaseProcess, list[Work]] = {}
    waiting = {job.key: job for job in jobs if not _settled(job, folder)}
    deaths: Counter[str] = Counter()
    with working(f"{count} processes") as together:
        try:
            for _ in range(count):
                begin()
            while processes:
                multiprocessing.connection.wait([process.sentinel for process in processes], _POLL_SECONDS)
                for process, here in processes.items():
                    with suppress(EOFError, OSError):  # it has ended
                        while here.poll():
                            told[process] = here.recv()
                together.parts = [work for process in processes for work in told.get(process, ())]
                for process in [process for process in processes if not process.is_alive()]:
                    processes.pop(process).close()
                    if process.exitcode:
                        _bury(process, jobs, folder, deaths, count)
                        if any(not _settled(job, folder) for job in jobs):
                            begin()
                for job in [job for job in waiting.values() if _settled(job, folder)]:
                    settled(waiting.pop(job.key))
        finally:
            for process in processes:
                process.terminate()


@contextmanager
def _keyboard_off() -> Iterator[None]:
    """A process begun inside never hears Ctrl-C, which a terminal sends to all: its parent ends it.

    Ctrl-C that is pressed meanwhile comes afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    ensure_running()  # which would unblock it otherwise; what is blocked stays so in the new process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _bury(process: BaseProcess, jobs: Sequence[Job], folder: StudyFolder, deaths: Counter[str], count: int) -> None:
    """Count the death of a process against the job it was doing, which fails at the second."""
    job = next((job for job in jobs if folder.claimant(job.key) == process.pid and not _settled(job, folder)), None)
    deaths["" if job is None else job.key] += 1
    status = f"status {process.exitcode} (a negative one is a signal, -9 often a lack of memory)"
    if job is None and deaths[""] > count:
        raise LamellaError(
            f"{deaths['']} processes ended with {status} without a job. Finished cells stay: run it again, with fewer "
            "--jobs."
        )
    if job is not None and deaths[job.key] > 1:
        folder.fail(job, f"Two processes that were doing it ended, the last with {status}. Try it with fewer --jobs.")


def _worker(jobs: list[Job], folder: StudyFolder, parent: Connection) -> None:
    threading.Thread(target=_report, args=(parent,), daemon=True).start()
    quiet_libraries()  # several processes share one terminal
    work(jobs, folder)


def _report(here: Connection) -> None:
    """Tell the parent now and then how far this process is, and end with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive():
        with suppress(OSError):  # the parent is about to end
            here.send(under_way()[:1])
        parent.join(_POLL_SECONDS)
    os._exit(1)


def work_on_ray(jobs: Sequence[Job], folder: StudyFolder, address: str, settled: Told = lambda job: None) -> None:
    """Do every job on a Ray cluster, each when what it needs is there; a job whose worker dies is given to another.

    A cell takes one CPU, and one GPU where the cluster has any.

    Raises:
        LamellaError: Ray is not installed, no cluster answers, or workers write elsewhere.
    """
    labels = {job.key: job.label for job in jobs}
    with connected(address) as ray:
        cluster: Cluster[Job] = Cluster(ray, _on_worker, "cell", gpus=int("GPU" in ray.cluster_resources()))
        left = list(jobs)
        try:
            while True:
                left = [job for job in left if not _settled(job, folder)]
                ready = [job for job in left if _ready(job, folder, labels)]
                left = [job for job in left if job not in ready]
                for job in ready:
                    cluster.submit(job, job, StudyFolder(folder.path.resolve()))
                if cluster.waiting:
                    _await_one(cluster, folder, settled)
                elif any(not _settled(job, folder) for job in left):
                    time.sleep(_POLL_SECONDS)  # what is left needs what failed, or others are doing it
                else:
                    return
        finally:
            cluster.cancel()


def _await_one(cluster: Cluster[Job], folder: StudyFolder, settled: Told) -> None:
    try:
        done = cluster.next()
    except WorkersDiedError as error:
        folder.fail(error.piece, str(error))
        settled(error.piece)
        return
    if not _settled(done, folder):
        raise LamellaError(
            f"A worker finished {done.label}, but its row is not in {folder.path}. Workers must see the study's folder "
            "under the same path: use a shared file system."
        )
    settled(done)


def _on_worker(job: Job, folder: StudyFolder) -> None:
    quiet_libraries()
    work([job], folder)
