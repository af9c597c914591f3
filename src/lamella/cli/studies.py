"""A study from its cells to its page, as `lamella compare` and `lamella demo` run and show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from lamella.cli.output import console, print_json, show_results

if TYPE_CHECKING:
    from lamella.lab.studies.grid import Cell, Grid
    from lamella.lab.studies.rows import StudyFolder


def show_plan(grid: Grid, folder: StudyFolder, jobs: int, *, json: bool) -> None:
    """Say how long the study will take."""
    from lamella.lab.studies.grid import cells_of
    from lamella.lab.studies.planning import plan

    estimate = plan(cells_of(grid), folder, jobs)
    if json:
        print_json({"cells": estimate.cells, "done": estimate.done, "hours": estimate.hours})
    else:
        console.print(str(estimate), highlight=False)


def run_study(title: str, grid: Grid, folder: StudyFolder, jobs: int, *, force: bool, json: bool) -> None:
    """Say how long it will take, train what is not trained yet, and show what came out."""
    from lamella.lab.studies.grid import cells_of
    from lamella.lab.studies.planning import plan

    cells = cells_of(grid)
    jobs = min(jobs, len(cells))
    console.print(str(plan(cells, folder, jobs)), highlight=False)
    folder.begin(cells, force=force)
    _run_cells(cells, folder, jobs)
    _finish(title, grid, cells, folder, json)


def _run_cells(cells: list[Cell], folder: StudyFolder, jobs: int) -> None:
    """Train every cell that has no row yet."""
    from lamella.cli.progress import Bar
    from lamella.lab.studies.planning import plan
    from lamella.lab.studies.workers import work, work_in_processes

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


def _finish(title: str, grid: Grid, cells: list[Cell], folder: StudyFolder, json: bool) -> None:
    """Write the study's tables and page, and show what came out; exit status 1 if a cell could not be run."""
    from lamella.cli.pages import study_report
    from lamella.lab.report.report import write_report
    from lamella.lab.studies.costs import study_costs
    from lamella.lab.studies.study import summarise

    study = summarise(grid, cells, folder)
    costs = study_costs(grid, cells, folder, lambda name: console.print(f"measuring {name}"))
    page = folder.path / "report.html"
    write_report(study_report(title, study, costs), page)
    if json:
        print_json({"folder": str(folder.path), "report": str(page), **study.as_dict(costs)})
    else:
        show_results(study.results, study.cost.merge(costs, how="left"), study.summary)
        console.print(f"Report: {page}", highlight=False)
    if study.not_run:
        console.print(f"Not run: {len(study.not_run)} cell(s), the first: {study.not_run[0]}", highlight=False)
        raise typer.Exit(1)
