"""What is not as a study's cells left it is found by the doctor, and no table is made from it."""

import json
import shutil

import pandas as pd
import pytest
from tests.lab.studies.conftest import cell_of
from tests.lab.tiny_studies import write_study

import lamella
from lamella import LamellaError
from lamella.lab.studies.checks import check_rows
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.runner import run_cells
from lamella.lab.studies.study import summarise


@pytest.fixture(scope="module")
def finished(bert, questions, tmp_path_factory):
    """A finished study on a copy of the task; it is only copied."""
    folder = tmp_path_factory.mktemp("finished")
    task = shutil.copytree(questions[5:], folder / "task")
    grid = read_study(write_study(folder / "study.yaml", bert, f"file:{task}", max_steps=2), ["seeds=1"])
    cells, study = grid.cells(), StudyFolder(folder / "study")
    run_cells(cells, study)
    summarise(grid, cells, study)
    return grid, cells, study, task


@pytest.fixture
def study(finished, tmp_path):
    grid, cells, whole, _ = finished
    return grid, cells, StudyFolder(shutil.copytree(whole.path, tmp_path / "study"))


def swapped(one, other):
    one.rename(one.with_suffix(".kept"))
    other.rename(one)
    one.with_suffix(".kept").rename(other)


def edited(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_study_as_it_was_left_has_no_finding(study):
    _, cells, folder = study

    check_rows(cells, folder)
    diagnosis = lamella.doctor(folder.path)

    assert diagnosis.ok, diagnosis
    assert "3 of 3 cells are finished" in str(diagnosis)
    assert "24 values computed again" in str(diagnosis)


ROWS = {
    "swapped": (
        lambda first, other: swapped(first, other),
        "the row of another cell, MoLA|the row of another cell, LoRA",
    ),
    "another's metrics": (
        lambda first, other: edited(first, metrics=json.loads(other.read_text())["metrics"]),
        "does not say what the run in",
    ),
    "no metrics": (lambda first, other: edited(first, metrics=None), "does not say what was measured"),
    "no settings": (lambda first, other: edited(first, settings=[]), "cannot be used"),
    "no JSON": (lambda first, other: first.write_text("{"), "cannot be used"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_is_not_its_cell_s_is_refused(study, case):
    _, cells, folder = study
    change, said = ROWS[case]
    change(*(folder.row_path(cell_of(cells, method).key) for method in ("MoLA", "LoRA")))

    with pytest.raises(LamellaError, match=said):
        check_rows(cells, folder)
    assert "row-differs" in [finding.code for finding in lamella.doctor(folder.path).findings]


def test_a_run_or_a_table_that_was_changed_is_found(study):
    _, cells, folder = study
    table = pd.read_parquet(folder.path / "results.parquet")
    table.assign(value=table["value"] / 2).to_parquet(folder.path / "results.parquet")
    assert [finding.code for finding in lamella.doctor(folder.path).findings] == ["table-differs"]

    (folder.run(cells[0].key) / "predictions.parquet").unlink()
    found = lamella.doctor(folder.path).findings
    assert [finding.code for finding in found] == ["changed-since"]
    assert "predictions.parquet is missing" in found[0].what


@pytest.mark.parametrize("split", ["train", "test"])
def test_scores_of_other_rows_are_not_put_in_one_table(finished, study, split):
    path = finished[3] / f"{split}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))

    try:
        with pytest.raises(LamellaError, match=rf"is of other {split} rows than file:.* has now"):
            summarise(*study)
    finally:
        path.write_text("".join(lines))


def test_answers_of_another_cell_are_refused(ran, tmp_path):
    _, cells, folder = ran
    copy = StudyFolder(shutil.copytree(folder.path, tmp_path / "study"))
    check_rows(cells, copy)
    swapped(*(copy.answers(cell_of(cells, method).key) for method in ("MOLE", "uniform")))

    with pytest.raises(LamellaError, match="is not what was answered"):
        check_rows(cells, copy)
