"""`lamella compare`: methods side by side, fairly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import console, print_json
from lamella.cli.studies import finish, run_cells


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
    run_cells(cells, folder, jobs)
    finish(f"lamella compare {Path(recipe).stem}", grid, cells, folder, json)
