"""Work on a Ray cluster gives what this process gives, also where workers are killed; one cluster for all of it."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import pytest
import ray
from tests.lab.conftest import bert, questions
from tests.lab.studies.test_study_killed import MEASURED
from tests.lab.tiny_studies import write_study
from tests.similarity.alignment.sweeping.conftest import study

from lamella.cluster import RETRIES
from lamella.errors import LamellaError
from lamella.lab.runs.folder import RunFolder
from lamella.lab.studies.cells import Cell
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells, work, work_on_ray
from lamella.lab.studies.study import summarise
from lamella.similarity.alignment import sweep

__all__ = ["bert", "questions", "study"]


class Mortal(Cell):
    """Its first worker is killed while it trains."""

    def carry_out(self, folder):
        if not folder.run(self.key).exists():
            threading.Thread(target=_kill_when_it_trains, args=(folder.run(self.key),), daemon=True).start()
        return super().carry_out(folder)


def _kill_when_it_trains(run):
    while not RunFolder(run).checkpoints.is_dir():
        time.sleep(0.002)
    (run.parent / "killed").write_text(run.name)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Dying:
    """No worker survives it."""

    key: str = "dying"
    label: str = "what kills"
    needs: Sequence[str] = ()

    def carry_out(self, folder):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
        yield
        ray.shutdown()


def test_killed_workers_change_nothing(cluster, bert, questions, tmp_path):
    recipe = read_study(write_study(tmp_path / "study.yaml", bert, questions, max_steps=16), ["seeds=1"])
    cells = recipe.cells()
    first = cells[0]
    mortal = Mortal(first.backbone, first.task, first.method, first.settings)
    alone, there = StudyFolder(tmp_path / "alone"), StudyFolder(tmp_path / "there")
    seen = []

    work(cells, alone)
    run_cells([mortal, cells[1], cells[3]], there, ray="auto", finished=lambda job: seen.append(job.key))

    assert [there.failure(cell.key) for cell in cells] == [None] * len(cells)
    assert sorted(seen) == sorted({cell.key for cell in cells})
    tables = []
    for folder in (alone, there):
        summarise(recipe, cells, folder)
        tables.append(pd.read_parquet(folder.path / "results.parquet").drop(columns=["study", *MEASURED]))
    pd.testing.assert_frame_equal(*tables)
    assert (there.path / "runs" / "killed").read_text() == first.key


def test_an_error_comes_back_as_it_was(cluster, study, tmp_path):
    quick = {"aligner": "linear", "tile_pairs": 22, "load": study.load}
    with pytest.raises(LamellaError, match=r"steps=0, lr=0\.003, seed=0") as caught:
        sweep(study.capture, study.model, tmp_path, ray="auto", steps=0, **quick)
    assert type(caught.value) is LamellaError
    assert ray.is_initialized()  # a sweep does not close what it did not open


@pytest.mark.heavy  # a worker starts four times
def test_what_cannot_be_done_is_said(cluster, bert, questions, tmp_path):
    recipe = read_study(write_study(tmp_path / "study.yaml", bert, questions), ["seeds=1", "methods.head.router_lr=1"])
    folder = StudyFolder(tmp_path / "out")

    work_on_ray(recipe.cells()[3:], folder, "auto")
    assert "no trainable router" in folder.failure(recipe.cells()[3].key)
    work_on_ray([Dying()], folder, "auto")
    assert f"{RETRIES + 1} workers died" in folder.failure("dying")
