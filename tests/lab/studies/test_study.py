import json

import numpy as np
import pandas as pd
import pytest
from tests.lab.tiny_studies import write_study

from lamella.lab.runs.floors import FLOOR, MAJORITY
from lamella.lab.studies import workers
from lamella.lab.studies.grid import cells_of, read_grid
from lamella.lab.studies.planning import plan
from lamella.lab.studies.rows import StudyFolder
from lamella.lab.studies.study import summarise
from lamella.lab.studies.workers import work, work_in_processes


@pytest.fixture
def study(bert, questions, tmp_path):
    grid = read_grid(write_study(tmp_path / "study.yaml", bert, questions))
    return grid, cells_of(grid), StudyFolder(tmp_path / "out")


def test_a_study_says_what_its_runs_say(study):
    grid, cells, folder = study
    started = []
    before = plan(cells, folder)
    work(cells, folder, starting=lambda cell: started.append(cell.label))
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
    assert rows.loc[[FLOOR, MAJORITY], ["seed 0", "seed 1", "mean", "interval"]].notna().all(axis=None)
    assert rows.loc["LoRA", "difference"] == "reference"
    assert rows.loc["again", "difference"].startswith("+0.000 [+0.000, +0.000]")
    assert float(rows.loc["again", "p"]) == 1
    assert "Not told apart from LoRA: " in found.summary
    assert "Floors: TF-IDF 1.000" in found.summary
    assert set(found.routing["stack"].str.partition(",")[0]) == {"MoLA"}
    assert any("rank" in note and "MoLA" in note for note in found.notes)


def test_finished_cells_are_taken_as_they_are(study, monkeypatch):
    _, cells, folder = study
    work(cells[:2], folder)
    (folder.path / "rows" / f"{cells[0].key}.json").unlink()  # killed between the end of a run and its row

    def untouched(*args, **kwargs):
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr("lamella.lab.studies.rows.train", untouched)
    work(cells[:2], folder)
    assert folder.finished(cells[0].key)
    folder.begin(cells[:2], force=True)
    with pytest.raises(AssertionError, match="trained again"):
        work(cells[:2], folder)


def test_a_cell_that_fails_is_said_and_the_others_run(bert, questions, tmp_path):
    recipe = write_study(tmp_path / "study.yaml", bert, questions)
    grid = read_grid(recipe, ["methods.head.router_lr=1", "seeds=1"])
    cells, folder = cells_of(grid), StudyFolder(tmp_path / "out")

    work(cells, folder)
    found = summarise(grid, cells, folder)

    assert [label.partition(" ")[0] for label in found.not_run] == ["head"]
    assert any("Not run: head" in note and "no trainable router" in note for note in found.notes)
    table = pd.read_parquet(folder.path / "results.parquet").set_index("method")
    assert table.loc["head", "status"] == "not run"
    assert np.isnan(table.loc["head", "value"])
    assert found.results.set_index("method").loc["head", ["seed 0", "mean", "interval"]].isna().all()
    folder.begin(cells)
    assert folder.failure(cells[-1].key) is None  # the next attempt tries it again


def test_a_claimed_cell_is_left_to_its_owner(study):
    _, cells, folder = study
    with folder.claim(cells[0].key) as mine:
        assert mine
        with folder.claim(cells[0].key) as other:
            assert not other
        assert not workers._take(cells[0], folder, (), lambda cell: None)
    with folder.claim(cells[0].key) as mine:
        assert mine


def test_processes_give_the_table_of_one(study, tmp_path):
    grid, cells, folder = study
    seen = []
    work_in_processes(cells, folder, 2, lambda cell: seen.append(cell.key))
    alone = StudyFolder(tmp_path / "alone")
    work(cells, alone)

    first, second = summarise(grid, cells, folder), summarise(grid, cells, alone)

    assert sorted(seen) == sorted({cell.key for cell in cells})
    pd.testing.assert_frame_equal(first.results, second.results)
