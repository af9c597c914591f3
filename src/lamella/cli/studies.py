"""A study from its cells to its page, as `lamella compare` and `lamella demo` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lamella.cli.output import Bar, console, print_json, show_results

if TYPE_CHECKING:
    import pandas as pd

    from lamella.training.grid import Cell, Grid
    from lamella.training.rows import StudyFolder


def run_cells(cells: list[Cell], folder: StudyFolder, jobs: int) -> None:
    """Train every cell that has no row yet."""
    from lamella.training.planning import plan
    from lamella.training.workers import work, work_in_processes

    def starting(cell: Cell) -> None:
        console.print(cell.label, highlight=False)

    def finished(cell: Cell) -> None:
        console.print(f"{cell.label}: done. {plan(cells, folder, jobs)}", highlight=False)

    if jobs > 1:
        work_in_processes(cells, folder, jobs, finished)
        return
    bar = Bar()
    try:
        work(cells, folder, [bar], starting)
    finally:
        bar.close()


def finish(title: str, grid: Grid, cells: list[Cell], folder: StudyFolder, json: bool) -> None:
    """Write the study's tables and page, and show what came out; exit status 1 if a cell could not be run."""
    from lamella.cli.pages import study_report
    from lamella.reporting.report import write_report
    from lamella.training.study import summarise

    study = summarise(grid, cells, folder)
    costs = _costs(grid, cells, folder)
    page = folder.path / "report.html"
    write_report(study_report(title, study, costs), page)
    if json:
        print_json({"folder": str(folder.path), "report": str(page), **study.as_dict(), "costs": _records(costs)})
    else:
        show_results(study.results, study.cost.merge(costs, how="left"), study.summary)
        console.print(f"Report: {page}", highlight=False)
    if study.not_run:
        console.print(f"Not run: {len(study.not_run)} cell(s), the first: {study.not_run[0]}", highlight=False)
        raise typer.Exit(1)


def _costs(grid: Grid, cells: list[Cell], folder: StudyFolder) -> pd.DataFrame:
    """What the methods of each backbone cost, measured once and kept in ``costs.parquet``."""
    import pandas as pd

    from lamella.bench.costs import method_costs

    path = folder.path / "costs.parquet"
    known = pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=["method", "backbone", "key"])
    frames = []
    for backbone in grid.backbones:
        firsts: dict[str, Cell] = {}
        for cell in cells:
            if cell.backbone == backbone and folder.finished(cell.key):
                firsts.setdefault(cell.method, cell)
        keys = [cell.key for cell in firsts.values()]
        own = known[(known["backbone"] == backbone) & known["key"].isin(keys)]
        if grid.reference_name in firsts and set(own["method"]) != set(firsts):
            settings = {name: cell.settings for name, cell in firsts.items()}
            own = method_costs(settings, grid.reference_name, lambda name: console.print(f"measuring {name}"))
            own.insert(1, "backbone", backbone)
            own["key"] = keys
        frames.append(own)
    costs = pd.concat(frames, ignore_index=True)
    partial = path.with_name(f".{path.name}.partial")
    costs.to_parquet(partial, index=False)
    partial.replace(path)
    return costs.drop(columns="key")


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    import json

    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return records
