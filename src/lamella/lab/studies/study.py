"""A study as it stands: its tables written and at hand, and what they say in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lamella.files import write_atomic
from lamella.findings import Finding
from lamella.lab.studies.cells import Cell
from lamella.lab.studies.checks import check_rows
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.recipe import StudyRecipe, settings_by_method
from lamella.lab.studies.results import cost_table, results_of, results_table
from lamella.lab.studies.summary import HOW_SURE, summary


@dataclass(frozen=True)
class Study:
    """What a study says.

    Attributes:
        recipe: what was planned.
        cells: of the recipe.
        folder: where they lie.
        summary: in words, three lines at most, the verdict first.
        results: as `results_table` gives it, of the tables that the summary speaks of.
        cost: as `cost_table` gives it.
        findings: the doctor's findings in every run, the run's label before where it is.
        settings: the recipe, what each method's runs were given, and where they lie.
        notes: how the numbers were made.
        not_run: labels of the cells that lack anything, each with the reason.
    """

    recipe: StudyRecipe
    cells: Sequence[Cell]
    folder: StudyFolder
    summary: str
    results: pd.DataFrame
    cost: pd.DataFrame
    findings: list[Finding]
    settings: Mapping[str, Any]
    notes: list[str]
    not_run: list[str]

    @property
    def routed_runs(self) -> dict[str, Path]:
        """The first finished run of every method that has routers, by the method's name."""
        runs: dict[str, Path] = {}
        for cell in self.cells:
            run = self.folder.run(cell.key)
            if self.folder.finished(cell.key) and (run / "trace.parquet").is_file():
                runs.setdefault(cell.method, run)
        return runs

    def as_dict(self, costs: pd.DataFrame) -> dict[str, Any]:
        """The tables and words as plain values, for JSON, beside what the methods were measured to cost."""
        tables = {"results": self.results, "cost": self.cost, "costs": costs}
        return {
            "summary": self.summary,
            **{name: json.loads(table.to_json(orient="records")) for name, table in tables.items()},
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
            "not_run": self.not_run,
        }


def summarise(recipe: StudyRecipe, cells: Sequence[Cell], folder: StudyFolder) -> Study:
    """Write the study's tables, as Parquet, and ``study.yaml`` from what is on disk; make what is said of them.

    Raises:
        LamellaError: a task cannot be loaded, or a row is not what its cell left.
    """
    check_rows(cells, folder)
    measured = recipe.measured(cells, folder)
    not_run = [_not_run(cell, folder) for cell in cells if not folder.finished(cell.last)]
    for name, table in measured.tables.items():
        folder.write_table(folder.path / f"{name}.parquet", table)
    said = recipe.model_dump(mode="json")
    write_atomic(folder.path / "study.yaml", yaml.safe_dump(recipe.written(), sort_keys=False))
    tables = results_of(recipe, measured.tables["results"], measured.tables["examples"])
    shown = [results for results in tables if not results.part]
    return Study(
        recipe=recipe,
        cells=cells,
        folder=folder,
        summary=summary(shown, recipe.listed, {one.method for one in cells if one.settings.method.is_mixture}),
        results=results_table(shown),
        cost=cost_table(recipe, measured.tables["results"]),
        findings=_findings(cells, folder),
        settings={
            "study": {key: value for key, value in said.items() if key != "methods"},
            **settings_by_method([replace(cell, settings=folder.chosen(cell)) for cell in cells]),
            "runs": {cell.label: f"runs/{folder.run(cell.key).name}" for cell in cells if folder.finished(cell.key)},
        },
        notes=[
            HOW_SURE,
            *recipe.notes(cells, folder, tables),
            *measured.notes,
            *_unexamined(cells, folder),
            *(f"Not run: {label}" for label in not_run),
        ],
        not_run=not_run,
    )


def _findings(cells: Sequence[Cell], folder: StudyFolder) -> list[Finding]:
    distinct = {cell.key: cell for cell in cells}.values()
    return [
        Finding(**finding | {"where": f"{cell.label}: {finding['where']}"})
        for cell in distinct
        for finding in (folder.row(cell.key) or {}).get("diagnosis", {}).get("findings", [])
    ]


def _unexamined(cells: Sequence[Cell], folder: StudyFolder) -> list[str]:
    """Which methods the doctor did not look at."""
    rows = {cell.method: folder.row(cell.key) for cell in cells}
    left = [method for method, row in rows.items() if row is not None and "diagnosis" not in row]
    words = "nothing in them is trained, or PEFT's X-LoRA cannot be loaded as the doctor loads"
    return [f"The doctor did not examine {', '.join(left)}: {words}."] if left else []


def _not_run(cell: Cell, folder: StudyFolder) -> str:
    reason = folder.failure(cell.key) or folder.failure(cell.last) or ""
    return f"{cell.label}. {reason}".strip()
