"""Does a study's folder hold what its cells left? What `lamella.doctor` and `lamella compare` examine of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from lamella.errors import LamellaError, UnreadableError
from lamella.files import read_table, sha256_of
from lamella.findings import Examination, Finding
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.rows import Rows
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies.cells import Asked, Cell, Job, jobs_of, key_of
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import read_study
from lamella.lab.studies.search import Search

_PLACE = ["backbone", "task", "method", "seed", "split", "metric"]
_AGAIN = "delete it, and `lamella compare` makes it again from the cell's run"


def check_rows(cells: Sequence[Cell], folder: StudyFolder) -> None:
    """Raises LamellaError for the first row that is not what its cell left, or is of other rows of its task."""
    for path, fault, fix in _faults(cells, folder):
        raise UnreadableError(f"{path} {fault}. {fix[0].upper()}{fix[1:]}.")


def examine_study(
    path: Path, base: nn.Module | str | None, batches: list[dict[str, Any]] | None, examination: Examination
) -> None:
    """Examines the rows of a study, the files of its runs, and whether its table follows from them.

    Args:
        path: of the study.
        base: none is needed.
        batches: none are needed.
        examination: takes the findings.

    Raises:
        LamellaError: ``study.yaml`` cannot be read.
    """
    recipe, folder = read_study(str(path)), StudyFolder(path)
    cells = recipe.cells()
    done = {cell.key: cell for cell in cells if folder.finished(cell.key)}
    for row, fault, fix in _faults(cells, folder):
        examination.error("row-differs", f"{row.name} {fault}", str(row.relative_to(path)), "tables rest on it", fix)
    examination.saw(f"rows: {len(done)} of {len({cell.key for cell in cells})} cells are finished")
    for cell in done.values():
        _examine_run(cell, folder, examination)
    examination.saw("the runs' files: compared with their digests; their models are examined by naming a run's folder")
    if any(finding.severity == "error" for finding in examination.findings):
        examination.saw("the table: not examined before the rows are mended")
        return
    if not done:
        return
    try:
        again = recipe.measured(cells, folder).tables["results"]
        _compare_tables(again, read_table(path / "results.parquet", "value"), examination)
    except UnreadableError as error:
        examination.error("unreadable", str(error), "results.parquet", "the table cannot be compared", _AGAIN)
    except LamellaError as error:
        examination.saw(f"the table: not examined. {error}")


def _faults(cells: Sequence[Cell], folder: StudyFolder) -> Iterator[tuple[Path, str, str]]:
    """Files on which tables rest and that are not what was left; what is wrong with each, and what to do."""
    labels = {cell.key: cell.label for cell in reversed(cells)}  # the first that bears a key names it
    current: dict[str, dict[str, str] | None] = {}
    for job in jobs_of(cells):
        if not folder.finished(job.key):
            continue
        path = folder.row_path(job.key)
        try:
            row = folder.row(job.key) or {}
            if isinstance(job, Cell):
                fault = _fault_of_row(job, row, folder, labels)
                if fault is None and (split := _moved(job, row, current)):
                    fix = "restore them, or run the study again with --force"
                    yield path, f"is of other {split} rows than {job.task} has now", fix
            elif isinstance(job, Search):
                fault = None if isinstance(row.get("chosen"), dict) else "does not say what was chosen"
            else:
                path, fault = _fault_of_answers(job, row, folder)
        except LamellaError as error:
            fault = f"cannot be used ({error})"
        if fault is not None:
            yield path, fault, _AGAIN


def _fault_of_row(cell: Cell, row: Mapping[str, Any], folder: StudyFolder, labels: Mapping[str, str]) -> str | None:
    if not isinstance(row.get("metrics"), dict) or not isinstance(row.get("seconds"), int | float):
        return "does not say what was measured"
    if not _is_diagnosis(row.get("diagnosis", {"findings": []})):
        return "does not say what the doctor found"
    key = key_of(folder.saved_settings(row), cell.questions)
    if key != (cell.key if cell.search is None else key_of(folder.chosen(cell), cell.questions)):
        return f"is the row of another cell{f', {labels[key]}' if key in labels else ''}"
    run = RunFolder(folder.run(cell.key))
    if run.finished and json.dumps(run.metrics()) != json.dumps(row["metrics"]):
        return f"does not say what the run in {run.path} measured"
    return None


def _is_diagnosis(said: Any) -> bool:
    findings = said.get("findings") if isinstance(said, dict) else None
    known = {field.name for field in fields(Finding)}
    return isinstance(findings, list) and all(
        isinstance(one, dict) and one.keys() == known and all(isinstance(value, str) for value in one.values())
        for one in findings
    )


def _fault_of_answers(job: Job, row: Mapping[str, Any], folder: StudyFolder) -> tuple[Path, str | None]:
    assert isinstance(job, Asked)
    path = folder.masked(job.cell.key) if job.masked else folder.answers(job.cell.key)
    digest = row.get("sha256")  # an earlier edition kept none
    as_left = digest is None or (path.is_file() and sha256_of(path) == digest)
    return path, None if as_left else "is not what was answered"


def _moved(cell: Cell, row: Mapping[str, Any], current: dict[str, dict[str, str] | None]) -> str:
    """A split whose rows are no longer those of the cell; empty where there is none, or none can be told.

    Args:
        cell: that was run.
        row: of the cell.
        current: what each task's rows are called now, which is added to.
    """
    before, task = row["metrics"].get("rows", {}), f"{cell.settings.task} {cell.settings.limit}"
    if before and task not in current:
        try:
            current[task] = Rows.of(task_of(cell.settings)).names()
        except LamellaError:  # tables that need the task say so
            current[task] = None
    now = current.get(task) if before else None
    return (
        "" if now is None else next((split for split in {**before, **now} if before.get(split) != now.get(split)), "")
    )


def _examine_run(cell: Cell, folder: StudyFolder, examination: Examination) -> None:
    run = RunFolder(folder.run(cell.key))
    try:
        changed = run.changed() or {}
    except UnreadableError as error:
        changed = {"digests.json": str(error)}
    if changed:
        examination.error(
            "changed-since",
            f"{cell.label}: " + "; ".join(f"{name} {fate}" for name, fate in changed.items()),
            [f"runs/{run.path.name}/{name}" for name in changed],
            "the run's folder is not what the run left",
            "restore it from a copy, or run the study again with --force",
        )


def _compare_tables(again: pd.DataFrame, saved: pd.DataFrame, examination: Examination) -> None:
    """Whether each saved value is found again; cells may have been finished since."""
    place = [column for column in _PLACE if column in saved]  # an earlier edition had fewer
    saved = saved[saved["value"].notna()]
    both = saved.merge(again, on=place, suffixes=("", "_again"))
    if len(both) != len(saved) or not (both["value"] - both["value_again"]).abs().le(1e-9).all():
        examination.error(
            "table-differs",
            "results.parquet does not follow from the rows",
            "results.parquet",
            "the scores that it shows are not those of the runs",
            "let `lamella compare` write it again: finished cells are not run again",
        )
    examination.saw(f"the table: {len(saved)} values computed again from the rows")
