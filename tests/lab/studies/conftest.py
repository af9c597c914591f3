import pytest
import yaml
from tests.lab.conftest import shared
from tests.lab.tiny_runs import question_task

from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells

RUN = {
    "batch_size": 8,
    "max_steps": 4,
    "max_length": 32,
    "lr": 5e-3,
    "log_every": 2,
    "evaluate_every": 4,
    "keep": "last",
}


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
