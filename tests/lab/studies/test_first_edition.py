"""Folders of studies that the first edition wrote open, and nothing of them is run again."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.planning import plan
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.study import summarise

WRITTEN = Path(__file__).parents[2] / "first_edition"
PLACE = ["task", "method", "seed", "metric"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folders as they were written, with relative paths in them."""
    for name in ("base", "rows", "study", "composition_study"):
        shutil.copytree(WRITTEN / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "cells"), [("study", 3), ("composition_study", 7)])
def test_its_cells_are_recognised_and_say_the_same(here, name, cells):
    before = pd.read_parquet(here / name / "results.parquet")
    recipe, folder = read_study(name), StudyFolder(Path(name))

    folder.adopt(recipe.cells())
    found = plan(recipe.cells(), folder)
    study = summarise(recipe, recipe.cells(), folder)

    assert (found.cells, found.done, found.hours) == (cells, cells, 0)
    assert study.not_run == []
    after = pd.read_parquet(here / name / "results.parquet")
    place = [*PLACE, *(["split"] if "split" in before else [])]
    both = before[[*place, "value"]].merge(after[[*place, "value"]], on=place)
    assert len(both) == len(before) == len(after)
    assert both["value_x"].to_list() == pytest.approx(both["value_y"].to_list())
    assert folder.adopt(recipe.cells()) == []
