"""`lamella compare`: methods side by side, fairly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.output import Bar, console, print_json, show_results

if TYPE_CHECKING:
    from lamella.training.grid import Cell, Grid
    from lamella.training.rows import StudyFolder


def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="A recipe of a study, and changes to it."),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; runs/RECIPE if absent.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Say how many hours it will take, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Train every method on every backbone and task with every seed; say which are better, and how sure that is.

    A study that was interrupted goes on where it stopped, and equal settings are trained once. Exit status 1 if a cell
    could not be run.

    Example: lamella compare trec-shapes seeds=3 --jobs 2 -o runs/shapes
    """
    from lamella.cli.words import recipe_and_overrides
    from lamella.errors import LamellaError
    from lamella.training.grid import cells_of, read_grid
    from lamella.training.planning import plan as planned
    from lamella.training.rows import StudyFolder

    recipe, overrides = recipe_and_overrides(words)
    if recipe is None:
        raise LamellaError("Name the recipe of a study: the packaged trec-shapes, or a YAML file.")
    grid = read_grid(recipe, overrides)
    cells = cells_of(grid)
    folder = StudyFolder(output or Path("runs") / Path(recipe).stem)
    estimate = planned(cells, folder, jobs)
    console.print(str(estimate), highlight=False)
    if plan:
        if json:
            print_json({"cells": estimate.cells, "done": estimate.done, "hours": estimate.hours})
        return
    folder.begin(cells, force=force)
    _run(cells, folder, jobs)
    _finish(recipe, grid, cells, folder, json)


def _run(cells: list[Cell], folder: StudyFolder, jobs: int) -> None:
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


def _finish(recipe: str, grid: Grid, cells: list[Cell], folder: StudyFolder, json: bool) -> None:
    from lamella.cli.pages import study_report
    from lamella.reporting.report import write_report
    from lamella.training.study import summarise

    study = summarise(grid, cells, folder)
    page = folder.path / "report.html"
    write_report(study_report(f"lamella compare {Path(recipe).stem}", study), page)
    if json:
        print_json({"folder": str(folder.path), "report": str(page), **study.as_dict()})
    else:
        show_results(study.results, study.cost, study.summary)
        console.print(f"Report: {page}", highlight=False)
    if study.not_run:
        console.print(f"Not run: {len(study.not_run)} cell(s), the first: {study.not_run[0]}", highlight=False)
        raise typer.Exit(1)
