import fcntl
import os
from contextlib import contextmanager

import pytest
import yaml
from tests.lab.tiny_runs import question_task

from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells

RUN = {
    "batch_size": 8,
    "max_steps": 6,
    "max_length": 32,
    "lr": 5e-3,
    "log_every": 2,
    "evaluate_every": 3,
    "keep": "last",
}


@contextmanager
def shared(tmp_path_factory, name):
    """A folder that all workers of the session have, one at a time: what one of them has made, the others find."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


@pytest.fixture(scope="session")
def recipe(bert, tmp_path_factory):
    """A study of two sources, one held-out task and four methods, as a file."""
    with shared(tmp_path_factory, "composition") as folder:
        path = folder / "study.yaml"
        return str(path) if path.is_file() else _write_recipe(path, bert)


def _write_recipe(path, bert):
    folder = path.parent
    tasks = {name: question_task(folder / name, train=size) for name, size in (("a", 40), ("b", 44), ("c", 48))}
    study = {
        "backbone": bert,
        "sources": {"a": f"{tasks['a']}@24", "b": f"{tasks['b']}@28"},
        "held_out": {"c": tasks["c"]},
        "seeds": [0, 1],
        "rows": 12,
        "test_rows": 10,
        "reference": "MOLE",
        "run": RUN,
        "lora": {"method": {"r": 2, "target_modules": ["query", "value"]}, "lr": 5e-2},
        "methods": {
            "MOLE": {"method": {"name": "mole", "train_head": False}},
            "uniform": {"method": "uniform"},
            "only a": {"method": {"name": "single", "adapter": "a"}},
            "X-LoRA": {"method": "xlora"},
            "only b": {"method": "uniform", "sources": ["b"]},
        },
        "masked": ["MOLE", "uniform"],
    }
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return str(path)


@pytest.fixture(scope="session")
def ran(recipe, tmp_path_factory):
    """The study, its cells, and the folder it was run in."""
    with shared(tmp_path_factory, "composition") as folder:
        return run(recipe, folder / "study")


def run(recipe, path, *changes):
    """The study, its cells and its folder, after all that can be run has been."""
    study = read_study(recipe, changes)
    cells, folder = study.cells(), StudyFolder(path)
    run_cells(cells, folder)
    return study, cells, folder


def cell_of(cells, method, seed=0):
    return next(cell for cell in cells if (cell.method, cell.seed) == (method, seed))
