import json

import numpy as np
import pandas as pd
import pytest
from tests.lab.tiny_studies import write_study

from lamella.errors import LamellaError
from lamella.lab.pages import study_report
from lamella.lab.report.report import write_report
from lamella.lab.runs.run import train
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies import runner
from lamella.lab.studies.costs import study_costs
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.planning import plan, tellable
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise


@pytest.fixture
def study(bert, questions, tmp_path):
    grid = read_study(write_study(tmp_path / "study.yaml", bert, questions))
    return grid, grid.cells(), StudyFolder(tmp_path / "out")


def test_a_plan_says_what_difference_can_be_told(study):
    """That of McNemar's test with one in twenty answered unlike: 2.8 standard errors."""
    _, cells, _ = study
    (rows,) = {len(task_of(cell.settings).splits["test"]) for cell in cells}
    assert tellable(cells) == {cells[0].task: pytest.approx((0.05 * 2.8**2 / rows) ** 0.5)}


def test_a_study_says_what_its_runs_say(study):
    grid, cells, folder = study
    started = []
    before = plan(cells, folder)
    run_cells(cells, folder, starting=lambda cell: started.append(cell.label))
    found = summarise(grid, cells, folder)
    after = plan(cells, folder)

    assert (before.cells, before.distinct, before.done) == (8, 6, 0)
    assert before.hours > 0
    assert (after.done, after.hours) == (6, 0)
    assert len(started) == 6  # the method 'again' has the settings of 'LoRA'
    assert found.not_run == []
    table = pd.read_parquet(folder.path / "results.parquet")
    assert set(table["status"]) == {"done"}
    assert not table.duplicated(["backbone", "task", "method", "seed", "split", "metric"]).any()
    for cell in cells:
        metrics = json.loads((folder.run(cell.key) / "metrics.json").read_text())
        own = table[(table["method"] == cell.method) & (table["seed"] == cell.seed)]
        for split in ("validation", "test"):
            values = own[own["split"] == split].set_index("metric")["value"].to_dict()
            assert values == metrics[split]
        assert set(own["trainable_parameters"]) == {metrics["trainable_parameters"]}
    accuracy = table[(table["split"] == "test") & (table["metric"] == "accuracy")]
    assert set(accuracy["floor_linear"]) == {1.0}  # the first word gives the label away
    assert accuracy["floor_majority"].between(0.2, 0.8).all()
    rows = found.results.set_index("method")
    assert rows.loc["LoRA", "mean"] == np.mean(accuracy.loc[accuracy["method"] == "LoRA", "value"])
    assert (
        rows.loc[["floor (linear)", "floor (majority)"], ["seed 0", "seed 1", "mean", "interval"]]
        .notna()
        .all(axis=None)
    )
    assert rows.loc["LoRA", "difference"] == "reference"
    assert rows.loc["again", "difference"].startswith("+0.000 [+0.000, +0.000]")
    assert float(rows.loc["again", "p"]) == 1
    assert "Against LoRA: not significantly different " in found.summary
    assert "Floors: linear 1.000" in found.summary
    assert set(found.routed_runs) == {"MoLA"}
    examples = pd.read_parquet(folder.path / "examples.parquet")
    means = examples[examples["seed"] >= 0].set_index(["method", "seed"])["scores"].map(np.mean)
    values = accuracy.set_index(["method", "seed"])["value"]
    assert means.to_dict() == pytest.approx(values.to_dict())
    assert any("rank" in note and "MoLA" in note for note in found.notes)


def test_finished_cells_are_taken_as_they_are(study, monkeypatch):
    _, cells, folder = study
    run_cells(cells[:2], folder)
    (folder.path / "rows" / f"{cells[0].key}.json").unlink()  # killed between the end of a run and its row
    left = folder.run(cells[0].key) / "checkpoints"
    left.mkdir()

    def untouched(*args, **kwargs):
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr("lamella.lab.studies.folder.train", untouched)
    run_cells(cells[:2], folder)
    assert folder.finished(cells[0].key)
    assert not left.exists()
    folder.begin(cells[:2], force=True)
    run_cells(cells[:2], folder)
    assert "trained again" in folder.failure(cells[0].key)


def test_a_cell_that_fails_is_said_and_the_others_run(bert, questions, tmp_path):
    recipe = write_study(tmp_path / "study.yaml", bert, questions)
    grid = read_study(recipe, ["methods.head.router_lr=1", "seeds=1"])
    cells, folder = grid.cells(), StudyFolder(tmp_path / "out")

    run_cells(cells, folder)
    found = summarise(grid, cells, folder)

    assert [label.partition(" ")[0] for label in found.not_run] == ["head"]
    assert any("Not run: head" in note and "no trainable router" in note for note in found.notes)
    table = pd.read_parquet(folder.path / "results.parquet").set_index("method")
    assert table.loc["head", "status"] == "not run"
    assert np.isnan(table.loc["head", "value"])
    assert found.results.set_index("method").loc["head", ["seed 0", "mean", "interval"]].isna().all()
    folder.begin(cells)
    assert folder.failure(cells[-1].key) is None  # the next attempt tries it again


@pytest.mark.parametrize("broken", [("lora",), ("mola", "lora", "head")], ids=["the reference", "all"])
def test_whatever_breaks_a_cell_the_others_go_on_and_it_is_said(bert, questions, tmp_path, monkeypatch, broken):
    grid = read_study(write_study(tmp_path / "study.yaml", bert, questions, max_steps=2), ["seeds=1"])
    cells, folder = grid.cells(), StudyFolder(tmp_path / "out")

    def breaking(settings, *words, **named):
        if settings.method.name in broken:
            raise RuntimeError("CUDA out of memory\nand much more")
        return train(settings, *words, **named)

    monkeypatch.setattr("lamella.lab.studies.folder.train", breaking)
    run_cells(cells, folder)
    found = summarise(grid, cells, folder)

    assert len(found.not_run) == len([cell for cell in cells if cell.settings.method.name in broken])
    assert all(label.endswith("seed 0. RuntimeError: CUDA out of memory") for label in found.not_run)
    write_report(study_report("a study", found, study_costs(found)), tmp_path / "report.html")
    assert "RuntimeError: CUDA out of memory" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seeds=[99999999999999999999]", "'seed' cannot be 99999999999999999999"),
        ("seeds=1000000000", "at most 1,000 are planned"),
        ("methods.LoRA.method.target_modules='(query'", "is not a regular expression"),
        ("methods.MoLA.method.exclude_modules='*'", "is not a regular expression"),
    ],
)
def test_settings_that_no_cell_could_run_with_are_refused_before_the_study_begins(
    bert, questions, tmp_path, change, said
):
    recipe = write_study(tmp_path / "study.yaml", bert, questions)

    with pytest.raises(LamellaError, match=said):
        read_study(recipe, ["methods.LoRA.method={name: lora}", "methods.MoLA.method={name: mola}", change]).cells()


def test_a_claimed_cell_is_left_to_its_owner(study):
    _, cells, folder = study
    with folder.claim(cells[0].key) as mine:
        assert mine
        with folder.claim(cells[0].key) as other:
            assert not other
        assert not runner._take(cells[0], folder, lambda cell: None)
    with folder.claim(cells[0].key) as mine:
        assert mine
