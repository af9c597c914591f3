"""A study from its cells to its page, as `lamella compare` and `lamella demo` run and show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lamella.cli.output import console, print_json, show_results
from lamella.cli.progress import showing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lamella.lab.studies.cells import Cell, Job
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.recipe import StudyRecipe


_SHOWN = 5  # cells that were not run, with their reasons; the report names all


def show_plan(recipe: StudyRecipe, path: Path, jobs: int, *, json: bool) -> None:
    """Say how long the study will take, and which differences it can tell."""
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.planning import plan, tellable

    with showing("planning"):
        cells = recipe.cells()
        estimate, smallest = plan(cells, StudyFolder(path), jobs), tellable(cells)
    if json:
        hours = {"cells": estimate.cells, "done": estimate.done, "hours": estimate.hours}
        print_json({**hours, "smallest_difference": smallest})
        return
    console.print(str(estimate))
    if smallest:
        told = ", ".join(f"{difference:.3f} on {name}" for name, difference in smallest.items())
        console.print(f"Smallest difference in accuracy that is found in four studies of five: about {told}.")


def run_study(
    title: str, recipe: StudyRecipe, path: Path, jobs: int, ray: str | None = None, *, force: bool, json: bool
) -> None:
    """Say how long it will take, run what is not run yet, and show what came out; status 1 if a cell was not run."""
    from lamella.lab.pages import study_report
    from lamella.lab.report.report import write_report
    from lamella.lab.studies.checks import check_rows
    from lamella.lab.studies.costs import study_costs
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.study import summarise
    from lamella.progress import working

    folder = StudyFolder(path)
    with showing(path.name):
        cells = recipe.cells()
        if adopted := folder.adopt(cells):
            console.print(
                f"{len(adopted)} cell(s) that an earlier edition of lamella finished are recognised by their settings "
                f"and used as they are: {adopted[0]}{', ...' * (len(adopted) > 1)}. {path / 'keys.json'} says where "
                "they lie."
            )
        folder.begin(cells, force=force)
        check_rows(cells, folder)
        _run(cells, folder, jobs, ray)
        with working("putting the results together"):
            study = summarise(recipe, cells, folder)
        costs = study_costs(study)
        with working("writing the report"):
            page = write_report(study_report(title, study, costs), path / "report.html")
    if json:
        print_json({"folder": str(path), "report": str(page), **study.as_dict(costs)})
    else:
        show_results(study.results, study.cost.merge(costs, how="left"), study.summary)
        console.print(f"Report: {page}")
    if study.not_run:
        console.print(f"Not run: {len(study.not_run)} cell(s), the first: {study.not_run[0]}")
        for label in study.not_run[1:_SHOWN]:
            console.print(f"Not run: {label}")
        raise typer.Exit(1)


def _run(cells: Sequence[Cell], folder: StudyFolder, jobs: int, ray: str | None) -> None:
    from lamella.lab.studies.planning import plan
    from lamella.lab.studies.runner import run_cells

    guesses: dict[tuple[Any, ...], float] = {}

    def starting(job: Job) -> None:
        console.print(job.label)

    def finished(job: Job) -> None:
        console.print(f"{job.label}: done")

    console.print(str(plan(cells, folder, jobs, guesses)))
    run_cells(cells, folder, jobs, ray, starting, finished, guesses)
