"""Who does the work of a study: this process, processes beside it, or the workers of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

from transformers import TrainerCallback

from lamella.cluster import Cluster, WorkersDiedError, connected
from lamella.errors import LamellaError
from lamella.lab.quiet import quiet_libraries
from lamella.lab.studies.cells import Cell, Job, jobs_of
from lamella.lab.studies.folder import StudyFolder

_POLL_SECONDS = 0.5
Told = Callable[[Job], None]


def run_cells(
    cells: Sequence[Cell],
    folder: StudyFolder,
    jobs: int = 1,
    ray: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    starting: Told = lambda job: None,
    finished: Told = lambda job: None,
) -> None:
    """Do all that these cells are made of and that has no row yet; whoever needs what failed fails too, and says so.

    Args:
        cells: of the study.
        folder: where they lie.
        jobs: processes, each with one thread; with one, this process works.
        ray: address of a Ray cluster whose workers see the folder under the same path, "auto" for the one on this
            machine, or "local"; in place of processes.
        callbacks: of the Trainer, where this process works.
        starting: told each job before it is begun, where this process works.
        finished: told each job that was done.

    Raises:
        LamellaError: processes cannot be kept alive, or no cluster answers.
    """
    work_list = jobs_of(cells)
    if ray is not None:
        work_on_ray(work_list, folder, ray, finished)
    elif jobs > 1:
        work_in_processes(work_list, folder, min(jobs, len(work_list)), finished)
    else:
        work(work_list, folder, callbacks, starting, finished)


def work(
    jobs: Sequence[Job],
    folder: StudyFolder,
    callbacks: Sequence[TrainerCallback] = (),
    starting: Told = lambda job: None,
    finished: Told = lambda job: None,
) -> None:
    """Do every job, until each has its row or has failed; what others are doing is waited for."""
    labels = {job.key: job.label for job in jobs}
    left = list(jobs)
    while left := [job for job in left if not _settled(job, folder)]:
        taken = False
        for job in left:
            if _ready(job, folder, labels) and _take(job, folder, callbacks, starting):
                taken = True
                if folder.finished(job.key):
                    finished(job)
        if not taken and any(not _settled(job, folder) for job in left):
            time.sleep(_POLL_SECONDS)


def _settled(job: Job, folder: StudyFolder) -> bool:
    return folder.finished(job.key) or folder.failure(job.key) is not None


def _ready(job: Job, folder: StudyFolder, labels: dict[str, str]) -> bool:
    """Whether everything is there that a job needs; a job that needs what failed fails."""
    if failed := [key for key in job.needs if folder.failure(key) is not None]:
        folder.fail(job, f"It needs {labels.get(failed[0], failed[0])}, which could not be run.")
    return all(folder.finished(key) for key in job.needs)


def _take(job: Job, folder: StudyFolder, callbacks: Sequence[TrainerCallback], starting: Told) -> bool:
    with folder.claim(job.key) as claimed:
        # another process may have finished it since the list was made
        if not claimed or _settled(job, folder):
            return False
        starting(job)
        try:
            folder.carry_out(job, callbacks)
        except LamellaError as error:
            folder.fail(job, str(error))
        except Exception as error:  # the other cells go on; the run's log has the traceback
            first_line = (str(error).strip().splitlines() or [""])[0]
            folder.fail(job, f"{type(error).__name__}: {first_line}")
        return True


def work_in_processes(jobs: Sequence[Job], folder: StudyFolder, count: int, finished: Told = lambda job: None) -> None:
    """`work` in ``count`` fresh processes; they end when this one does, however it ends.

    Another process takes the place of one that dies, and goes on with its job; a job over which two have died fails.

    Raises:
        LamellaError: processes die without a job.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each process has one core
    context = multiprocessing.get_context("spawn")  # a forked torch keeps locks and threads that no longer exist

    def begun() -> BaseProcess:
        process = context.Process(target=_worker, args=(list(jobs), folder))
        process.start()
        return process

    processes = [begun() for _ in range(count)]
    waiting = {job.key: job for job in jobs if not folder.finished(job.key)}
    deaths: Counter[str] = Counter()
    try:
        while processes:
            multiprocessing.connection.wait([process.sentinel for process in processes], _POLL_SECONDS)
            for process in [process for process in processes if not process.is_alive()]:
                processes.remove(process)
                if process.exitcode:
                    _bury(process, jobs, folder, deaths, count)
                    if any(not _settled(job, folder) for job in jobs):
                        processes.append(begun())
            for key in [key for key in waiting if folder.finished(key)]:
                finished(waiting.pop(key))
    finally:
        for process in processes:
            process.terminate()


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


def _worker(jobs: list[Job], folder: StudyFolder) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()  # several processes share one terminal
    work(jobs, folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work_on_ray(jobs: Sequence[Job], folder: StudyFolder, address: str, finished: Told = lambda job: None) -> None:
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
                    _await_one(cluster, folder, finished)
                elif any(not _settled(job, folder) for job in left):
                    time.sleep(_POLL_SECONDS)  # what is left needs what failed, or others are doing it
                else:
                    return
        finally:
            cluster.cancel()


def _await_one(cluster: Cluster[Job], folder: StudyFolder, finished: Told) -> None:
    try:
        done = cluster.next()
    except WorkersDiedError as error:
        folder.fail(error.piece, str(error))
        return
    if not _settled(done, folder):
        raise LamellaError(
            f"A worker finished {done.label}, but its row is not in {folder.path}. Workers must see the study's folder "
            "under the same path: use a shared file system."
        )
    if folder.finished(done.key):
        finished(done)


def _on_worker(job: Job, folder: StudyFolder) -> None:
    quiet_libraries()
    work([job], folder)
