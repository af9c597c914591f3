"""A study as a whole: its tables, written and at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from lamella.training.grid import Cell, Grid, settings_by_method
from lamella.training.outcome import contests, cost_table, results_table, tidy
from lamella.training.rows import StudyFolder
from lamella.training.verdict import notes, verdict


@dataclass(frozen=True)
class Study:
    """What a study says.

    Attributes:
        summary: the verdict in words.
        results: as `results_table` gives it.
        cost: as `cost_table` gives it.
        routing: traces of one routed run per method, the method's name in the column stack; None without routers.
        settings: the recipe, and what each method's runs were given.
        notes: how the numbers were made.
        not_run: labels of the cells without a row.
    """

    summary: str
    results: pd.DataFrame
    cost: pd.DataFrame
    routing: pd.DataFrame | None
    settings: Mapping[str, Any]
    notes: list[str]
    not_run: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The tables and words as plain values, for JSON."""
        return {
            "summary": self.summary,
            "results": json.loads(self.results.to_json(orient="records")),
            "cost": json.loads(self.cost.to_json(orient="records")),
            "notes": self.notes,
            "not_run": self.not_run,
        }


def summarise(grid: Grid, cells: Sequence[Cell], folder: StudyFolder) -> Study:
    """Write ``results.parquet`` and ``study.yaml`` from the rows on disk, and make the tables.

    Raises:
        LamellaError: a task cannot be loaded.
    """
    found = contests(grid, cells, folder)
    partial = folder.path / f".results.parquet.{os.getpid()}.partial"
    tidy(found).to_parquet(partial, index=False)
    partial.replace(folder.path / "results.parquet")
    recipe = grid.model_dump(mode="json")
    partial = folder.path / f".study.yaml.{os.getpid()}.partial"
    partial.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    partial.replace(folder.path / "study.yaml")
    return Study(
        summary=verdict(found, grid),
        results=results_table(found, grid),
        cost=cost_table(found, grid),
        routing=_routing(cells, folder),
        settings={"study": {key: recipe[key] for key in recipe if key != "methods"}, **settings_by_method(cells)},
        notes=notes(found, grid, folder),
        not_run=[cell.label for cell in cells if not folder.finished(cell.key)],
    )


def _routing(cells: Sequence[Cell], folder: StudyFolder) -> pd.DataFrame | None:
    frames: dict[str, pd.DataFrame] = {}
    for cell in cells:
        trace = folder.run(cell.key) / "trace.parquet"
        if cell.method not in frames and folder.finished(cell.key) and trace.is_file():
            frame = pd.read_parquet(trace)
            frames[cell.method] = frame.assign(stack=cell.method + ", " + frame["stack"].astype(str))
    return pd.concat(frames.values(), ignore_index=True) if frames else None
