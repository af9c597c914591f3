"""A study of composition, as `lamella compare` runs and shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from lamella.cli.output import console, print_json, show_results

if TYPE_CHECKING:
    from pathlib import Path

    from lamella.lab.studies.composition.grid import CompositionGrid, Stages
    from lamella.lab.studies.composition.running import CompositionFolder
    from lamella.lab.studies.grid import Cell


def show_composition_plan(grid: CompositionGrid, path: Path, jobs: int, *, json: bool) -> None:
    """Say how long the study will take."""
    from lamella.lab.studies.composition.grid import stages_of
    from lamella.lab.studies.composition.planning import plan_stages
    from lamella.lab.studies.composition.running import folder_of

    folder = folder_of(grid, path)
    estimate = plan_stages(grid, stages_of(grid, folder), folder, jobs)
    if json:
        print_json({"cells": estimate.cells, "done": estimate.done, "hours": estimate.hours})
    else:
        console.print(str(estimate), highlight=False)


def run_composition(name: str, grid: CompositionGrid, path: Path, jobs: int, *, force: bool, json: bool) -> None:
    """Run what is not run yet, and show what came out; exit status 1 if a cell could not be run."""
    from lamella.cli.progress import Bar
    from lamella.lab.studies.composition.grid import stages_of
    from lamella.lab.studies.composition.planning import plan_stages
    from lamella.lab.studies.composition.running import folder_of, run_stages

    folder = folder_of(grid, path)
    stages = stages_of(grid, folder)
    console.print(str(plan_stages(grid, stages, folder, jobs)), highlight=False)
    folder.begin(stages.all, force=force)
    bar = Bar()

    def said(cell: Cell) -> None:
        done = sum(folder.finished(one.key) for one in stages.all)
        console.print(f"{cell.method}, seed {cell.seed} ({done} of {len(stages.all)} done)", highlight=False)

    try:
        run_stages(stages, folder, jobs, [bar], said)
    finally:
        bar.close()
    _finish(name, grid, stages, folder, json=json)


def _finish(name: str, grid: CompositionGrid, stages: Stages, folder: CompositionFolder, *, json: bool) -> None:
    from lamella.cli.pages import composition_report
    from lamella.lab.report.report import write_report
    from lamella.lab.studies.composition.study import summarise_composition

    study = summarise_composition(name, grid, stages, folder)
    page = write_report(composition_report(f"lamella compare {name}", study), folder.path / "report.html")
    if json:
        print_json({"folder": str(folder.path), "report": str(page), **study.as_dict()})
    else:
        show_results(study.results[study.results["task"].isin(study.headline)], study.cost, study.summary)
        console.print(f"Report: {page}", highlight=False)
    if study.not_run:
        console.print(f"Not run: {len(study.not_run)} cell(s), the first: {study.not_run[0]}", highlight=False)
        raise typer.Exit(1)
