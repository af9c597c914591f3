import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import pandas as pd
import pytest
from tests.lab.tiny_studies import write_study

from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import work, work_in_processes
from lamella.lab.studies.study import summarise

MEASURED = ["build_seconds", "train_seconds", "seconds_per_step", "peak_memory_bytes"]


@pytest.fixture(scope="module")
def fresh():
    """Processes that have imported everything and done nothing: a kill then falls into the work, not into imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lamella.lab.studies.runner"])
    return context


@pytest.fixture
def study(bert, questions, tmp_path):
    path = write_study(tmp_path / "study.yaml", bert, questions, max_steps=16, evaluate_every=4)
    grid = read_study(path, ["seeds=1"])
    return grid, grid.cells()


def table(grid, cells, folder):
    summarise(grid, cells, folder)
    return pd.read_parquet(folder.path / "results.parquet").drop(columns=["study", *MEASURED])


def test_five_kills_at_random_moments_change_nothing(study, fresh, tmp_path):
    grid, cells = study
    whole, killed = StudyFolder(tmp_path / "whole"), StudyFolder(tmp_path / "killed0")
    started = time.monotonic()
    process = fresh.Process(target=work, args=(cells, whole))
    process.start()
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - started

    generator = random.Random(0)
    done, kills, begun = set(), 0, 0
    while kills < 5:
        process = fresh.Process(target=work, args=(cells, killed))
        process.start()
        process.join(0.28 * seconds * generator.random())  # five of them take 0.7 of the time: too little to finish
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            rows = {cell.key for cell in cells if killed.finished(cell.key)}
            assert rows.issuperset(done)
            done = rows
        else:  # the machine has become faster, and the study came to its end: the other kills fall into another one
            assert process.exitcode == 0
            begun += 1
            done, killed = set(), StudyFolder(tmp_path / f"killed{begun}")
    process = fresh.Process(target=work, args=(cells, killed))
    process.start()
    process.join()

    assert process.exitcode == 0
    pd.testing.assert_frame_equal(table(grid, cells, killed), table(grid, cells, whole))
    assert not list(killed.path.glob("runs/*/checkpoints"))


def test_workers_end_with_the_process_that_started_them(study, fresh, tmp_path):
    _, cells = study
    long = [cell.settings.model_copy(update={"max_steps": 100_000, "evaluate_every": 100_000}) for cell in cells]
    endless = [replace(cell, settings=one) for cell, one in zip(cells, long, strict=True)]
    endless = list({cell.key: cell for cell in endless}.values())
    folder = StudyFolder(tmp_path / "out")
    process = fresh.Process(target=work_in_processes, args=(endless, folder, 2))
    process.start()
    wait_until(lambda: len(list(folder.path.glob("runs/*/log.txt"))) == 2)
    assert sorted(claimable(endless, folder)) == [False] * 2 + [True]

    os.kill(process.pid, signal.SIGKILL)
    process.join()

    wait_until(lambda: all(claimable(endless, folder)))
    assert len(list(folder.path.glob("runs/*/log.txt"))) == 2


def claimable(cells, folder):
    free = []
    for key in {cell.key for cell in cells}:
        with folder.claim(key) as claimed:
            free.append(claimed)
    return free


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
