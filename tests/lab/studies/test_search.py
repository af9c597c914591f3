import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import yaml
from tests.lab.tiny_studies import write_study

from lamella.errors import LamellaError
from lamella.lab.studies import planning, search
from lamella.lab.studies.checks import check_rows
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.planning import plan
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise

SPACE = {"lr": {"low": 1e-4, "high": 1e-1}, "method": {"lora_alpha": [4, 8, 16]}}


@dataclass
class Runs:
    """In place of training: a score that is best at lr=3e-3 and alpha=8, or an error above a rate; and what it ran."""

    breaks_above: float = 1.0
    interrupted_at: int | None = None
    steps: list = None

    def __call__(self, settings, path, *, score_test):
        assert not score_test
        self.steps = [*(self.steps or []), (settings.max_steps, settings.seed)]
        if len(self.steps) == self.interrupted_at:
            raise KeyboardInterrupt
        if settings.lr > self.breaks_above:
            raise LamellaError("The loss is not finite.")
        score = -abs(settings.lr - 3e-3) - abs(settings.method.lora_alpha - 8)
        return SimpleNamespace(metrics={"metric": "accuracy", "validation": {"accuracy": score}, "train_seconds": 2.0})


@pytest.fixture
def searched(bert, questions, tmp_path):
    """The search for the first method of a study, eight tries, and a folder."""
    path = tmp_path / "study.yaml"
    write_study(path, bert, questions)
    recipe = yaml.safe_load(path.read_text())
    del recipe["run"]["lr"]
    path.write_text(yaml.safe_dump(recipe | {"search": {"space": SPACE}}, sort_keys=False))
    return read_study(str(path)), StudyFolder(tmp_path / "out")


def test_the_better_half_goes_on_and_the_best_is_chosen(searched, monkeypatch):
    study, folder = searched
    job = study.cells()[0].search
    runs = Runs()
    monkeypatch.setattr(search, "train", runs)
    row = job.carry_out(folder)
    whole = job.cell.settings.max_steps
    lengths = [max(1, round(share * whole)) for share in (0.25, 0.5, 1)]
    assert [steps for steps, _ in runs.steps] == [lengths[0]] * 8 + [lengths[1]] * 4 + [lengths[2]] * 2
    assert {seed for _, seed in runs.steps} == {10}

    first = [one for one in row["tries"] if one["share"] == 0.25]
    best = max(first, key=lambda one: one["validation"])
    assert row["chosen"] == best["values"]
    assert {*(one["values"]["method.lora_alpha"] for one in first)} <= {4, 8, 16}
    assert all(1e-4 <= one["values"]["lr"] <= 1e-1 for one in first)
    rates = [one["values"]["lr"] for one in first]
    assert len(set(rates)) == 8
    assert {int(4 * math.log(rate / 1e-4) / math.log(1e3)) for rate in rates[:4]} == {0, 1, 2, 3}
    assert row["metrics"]["train_seconds"] == 28.0


@pytest.mark.parametrize("tries", [2, 7])
def test_few_tries_are_whole_runs_each_so_that_no_quarter_of_one_decides_alone(searched, monkeypatch, tries):
    study, folder = searched
    job = replace(study.cells()[0].search, tries=tries)
    runs = Runs()
    monkeypatch.setattr(search, "train", runs)
    row = job.carry_out(folder)
    assert [steps for steps, _ in runs.steps] == [job.cell.settings.max_steps] * tries
    assert job.runs == tries
    assert row["chosen"] == max(row["tries"], key=lambda one: one["validation"])["values"]


def test_an_interrupted_search_ends_as_it_would_have(searched, monkeypatch, tmp_path):
    study, folder = searched
    job = study.cells()[0].search
    monkeypatch.setattr(search, "train", Runs())
    whole = job.carry_out(StudyFolder(tmp_path / "whole"))
    monkeypatch.setattr(search, "train", Runs(interrupted_at=7))
    with pytest.raises(KeyboardInterrupt):
        job.carry_out(folder)
    runs = Runs()
    monkeypatch.setattr(search, "train", runs)
    assert job.carry_out(folder) == whole
    assert len(runs.steps) == 14 - 6


def test_tries_that_fail_are_the_worst_and_a_search_without_a_score_says_why(searched, monkeypatch, tmp_path):
    study, folder = searched
    job = study.cells()[0].search
    monkeypatch.setattr(search, "train", Runs(breaks_above=1e-2))
    row = job.carry_out(folder)
    assert any("failed" in one for one in row["tries"])
    assert row["chosen"]["lr"] <= 1e-2
    monkeypatch.setattr(search, "train", Runs(breaks_above=0.0))
    with pytest.raises(LamellaError, match=r"No try of the search for MoLA .* not finite"):
        job.carry_out(StudyFolder(tmp_path / "none"))


def test_scaling_is_alpha_over_the_rank_of_each_method(searched):
    study, folder = searched
    study = study.model_copy(update={"seeds": [0], "search": search.Searched(space={"scaling": [4]})})
    alphas = {}
    for cell in study.cells():
        if cell.search is None:
            assert cell.method == "head"
            continue
        row = folder.row_path(cell.search.key)
        row.parent.mkdir(parents=True, exist_ok=True)
        row.write_text(json.dumps({"chosen": {"scaling": 4}}))
        method = folder.chosen(cell).method
        alphas[method.r] = method.lora_alpha
    assert alphas == {2: 8, 8: 32}


def test_tasks_are_read_once_for_plans_made_again(searched, monkeypatch):
    study, folder = searched
    guesses: dict = {}
    first = plan(study.cells(), folder, guesses=guesses)
    monkeypatch.setattr(planning, "task_of", None)

    assert plan(study.cells(), folder, guesses=guesses) == first
    with pytest.raises(TypeError):
        plan(study.cells(), folder)


def test_a_study_runs_with_what_was_chosen_and_counts_the_search(searched):
    study, folder = searched
    study = study.model_copy(update={"seeds": [0], "search": study.search.model_copy(update={"tries": 2})})
    cells = [cell for cell in study.cells() if cell.method == "head"]
    assert plan(cells, folder).hours > 0
    run_cells(cells, folder)
    check_rows(cells, folder)
    for cell in cells:
        row, found = folder.row(cell.key), folder.row(cell.search.key)
        assert row["settings"]["lr"] == found["chosen"]["lr"]
        tried = [one["validation"] for one in found["tries"] if one["share"] == 1.0]
        assert len(tried) == 2
        assert not list(folder.tries(cell.search.key).glob("*/adapter"))
    shown = summarise(study, cells, folder)
    assert any("2 tries for each method" in note for note in shown.notes)
    assert (shown.cost["searching seconds"] > 0).any()
    row = folder.row_path(cells[0].search.key)
    row.write_text(json.dumps({"seconds": 1.0}))
    with pytest.raises(LamellaError, match="what was chosen"):
        check_rows(cells, folder)
