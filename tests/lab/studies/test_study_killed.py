import multiprocessing
import os
import signal
import time
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from tests.killing import kill_at_random
from tests.lab.tiny_studies import write_study

from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import work, work_in_processes
from lamella.lab.studies.study import summarise

MEASURED = ["build_seconds", "train_seconds", "seconds_per_step", "peak_memory_bytes"]


@pytest.fixture
def study(bert, questions, tmp_path):
    path = write_study(tmp_path / "study.yaml", bert, questions, max_steps=6)
    grid = read_study(path, ["seeds=1"])
    return grid, grid.cells()[:2]


def test_kills_at_random_moments_change_nothing(study, fresh, tmp_path):
    """Three; fifty of everything that goes on where it was killed are in tests/test_killed.py."""
    grid, cells = study

    kills, ends = kill_at_random(
        fresh, partial(work, cells), StudyFolder, tmp_path, lambda folder: table(grid, cells, folder), kills=3, seed=0
    )

    assert kills == 3
    assert ends >= 1


def table(grid, cells, folder):
    assert not list(folder.path.glob("runs/*/checkpoints"))
    summarise(grid, cells, folder)
    return pd.read_parquet(folder.path / "results.parquet").drop(columns=["study", *MEASURED])


def work_in_forked(jobs, folder):
    """`work_in_processes`, the workers of which are forked: this process has done nothing that a fork could break."""
    multiprocessing.get_context = lambda method, of=multiprocessing.get_context: of("fork")
    work_in_processes(jobs, folder, 2)


def test_workers_are_replaced_and_end_with_the_process_that_started_them(study, fresh, tmp_path):
    _, cells = study
    long = [cell.settings.model_copy(update={"max_steps": 100_000, "evaluate_every": 100_000}) for cell in cells]
    endless = [replace(cell, settings=one) for cell, one in zip(cells, long, strict=True)]
    folder = StudyFolder(tmp_path / "out")
    process = fresh.Process(target=work_in_forked, args=(endless, folder))
    process.start()
    wait_until(lambda: len(list(folder.path.glob("runs/*/log.txt"))) == 2)
    assert claimable(endless, folder) == [False, False]

    victim = folder.claimant(endless[0].key)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: folder.claimant(endless[0].key) not in (victim, None))  # None: a claim that is being written
    assert claimable(endless, folder) == [False, False]
    assert folder.failure(endless[0].key) is None

    os.kill(folder.claimant(endless[0].key), signal.SIGKILL)  # whatever kills its workers is not tried for ever
    wait_until(lambda: folder.failure(endless[0].key) is not None)
    assert "the last with status -9 (a negative one is a signal" in folder.failure(endless[0].key)
    assert claimable(endless[1:], folder) == [False]  # and the rest of the study goes on

    os.kill(process.pid, signal.SIGKILL)
    process.join()

    wait_until(lambda: all(claimable(endless, folder)))


def claimable(cells, folder):
    free = []
    for key in (cell.key for cell in cells):
        with folder.claim(key) as claimed:
            free.append(claimed)
    return free


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
