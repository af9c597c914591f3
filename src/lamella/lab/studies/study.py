"""A study as a whole: its tables, written and at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lamella.files import whole, write_whole
from lamella.findings import Finding
from lamella.lab.methods import Molex
from lamella.lab.runs.callbacks import entropy_over_training
from lamella.lab.runs.tasks import task_of
from lamella.lab.runs.trained import load_trained
from lamella.lab.studies.choices import block_choices, choice_tables
from lamella.lab.studies.grid import Cell, Grid, settings_by_method
from lamella.lab.studies.outcome import contests, cost_table, results_table, tidy
from lamella.lab.studies.rows import StudyFolder
from lamella.lab.studies.verdict import notes, verdict


@dataclass(frozen=True)
class Study:
    """What a study says.

    Attributes:
        summary: the verdict in words.
        results: as `results_table` gives it.
        cost: as `cost_table` gives it.
        routing: traces of one routed run per method, the method's name in the column stack; None without routers.
        entropy: the routing of the same runs over training, as `entropy_over_training`, the method's name as run.
        redundancy: of the same runs' experts, the method's name in the column stack.
        routed: folder of the first of these runs; None without routers.
        choices: of MoLEx, which blocks its routers and its random control chose for which texts, tables by caption.
        findings: what the doctor found in every run, the run's label before where it is.
        settings: the recipe, what each method's runs were given, and where they lie.
        notes: how the numbers were made.
        not_run: labels of the cells without a row.
    """

    summary: str
    results: pd.DataFrame
    cost: pd.DataFrame
    routing: pd.DataFrame | None
    entropy: pd.DataFrame | None
    redundancy: pd.DataFrame | None
    routed: Path | None
    choices: dict[str, pd.DataFrame]
    findings: list[Finding]
    settings: Mapping[str, Any]
    notes: list[str]
    not_run: list[str]

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


def summarise(grid: Grid, cells: Sequence[Cell], folder: StudyFolder) -> Study:
    """Write ``results.parquet`` and ``study.yaml`` from the rows on disk, and make the tables.

    Raises:
        LamellaError: a task cannot be loaded.
    """
    found = contests(grid, cells, folder)
    with whole(folder.path / "results.parquet") as unfinished:
        tidy(found).to_parquet(unfinished, index=False)
    recipe = grid.model_dump(mode="json")
    write_whole(folder.path / "study.yaml", yaml.safe_dump(recipe, sort_keys=False))
    routed = _routed_runs(cells, folder)
    return Study(
        summary=verdict(found, grid),
        results=results_table(found, grid),
        cost=cost_table(found, grid),
        routing=_over_methods(routed, "trace.parquet"),
        entropy=_entropy(routed),
        redundancy=_redundancy(routed),
        routed=next(iter(routed.values()), None),
        choices=_choices(grid, cells, folder),
        findings=_findings(cells, folder),
        settings={
            "study": {key: recipe[key] for key in recipe if key != "methods"},
            **settings_by_method(cells),
            "runs": {cell.label: f"runs/{cell.key}" for cell in cells if folder.finished(cell.key)},
        },
        notes=notes(found, grid, folder),
        not_run=[cell.label for cell in cells if not folder.finished(cell.key)],
    )


def _routed_runs(cells: Sequence[Cell], folder: StudyFolder) -> dict[str, Path]:
    """The first finished run of every method that has routers."""
    runs: dict[str, Path] = {}
    for cell in cells:
        if folder.finished(cell.key) and (folder.run(cell.key) / "trace.parquet").is_file():
            runs.setdefault(cell.method, folder.run(cell.key))
    return runs


def _over_methods(runs: Mapping[str, Path], name: str) -> pd.DataFrame | None:
    return _stacked({method: pd.read_parquet(run / name) for method, run in runs.items()})


def _redundancy(runs: Mapping[str, Path]) -> pd.DataFrame | None:
    found = {method: load_trained(run).redundancy() for method, run in runs.items()}
    return _stacked({method: frame for method, frame in found.items() if frame is not None})


def _stacked(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame | None:
    """One frame of all methods', told apart by the name of the stack."""
    named = [frame.assign(stack=method + ", " + frame["stack"].astype(str)) for method, frame in frames.items()]
    return pd.concat(named, ignore_index=True) if named else None


def _entropy(runs: Mapping[str, Path]) -> pd.DataFrame | None:
    histories = {method: run / "routing.parquet" for method, run in runs.items()}
    curves = [
        entropy_over_training(pd.read_parquet(history)).assign(run=method)
        for method, history in histories.items()
        if history.is_file()  # a run shorter than its logging interval has none
    ]
    return pd.concat(curves, ignore_index=True) if curves else None


def _choices(grid: Grid, cells: Sequence[Cell], folder: StudyFolder) -> dict[str, pd.DataFrame]:
    """Of the first backbone and task, from the first run of each policy that decides for whole texts."""
    runs: dict[str, Cell] = {}
    for cell in cells:
        method = cell.settings.method
        if isinstance(method, Molex) and method.policy in ("learned", "random") and method.granularity == "sequence":
            here = (cell.backbone, cell.task) == (grid.backbones[0], grid.tasks[0])
            if here and folder.finished(cell.key) and "test" in task_of(cell.settings).splits:
                runs.setdefault(cell.method, cell)
    if not runs:
        return {}
    control = next(
        (name for name, cell in runs.items() if getattr(cell.settings.method, "policy", None) == "random"), None
    )
    return choice_tables({name: block_choices(folder.run(cell.key)) for name, cell in runs.items()}, control)


def _findings(cells: Sequence[Cell], folder: StudyFolder) -> list[Finding]:
    distinct = {cell.key: cell for cell in cells}.values()
    return [
        Finding(**finding | {"where": f"{cell.label}: {finding['where']}"})
        for cell in distinct
        if (row := folder.row(cell.key)) is not None
        for finding in row["diagnosis"]["findings"]
    ]
