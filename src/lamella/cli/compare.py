"""`lamella compare`: methods side by side, fairly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.studies import run_study, show_plan


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
    from lamella.training.grid import read_grid
    from lamella.training.rows import StudyFolder

    recipe, overrides = recipe_and_overrides(words)
    if recipe is None:
        raise LamellaError("Name the recipe of a study: the packaged trec-shapes, or a YAML file.")
    grid = read_grid(recipe, overrides)
    folder = StudyFolder(output or Path("runs") / Path(recipe).stem)
    if plan:
        show_plan(grid, folder, jobs, json=json)
    else:
        run_study(f"lamella compare {Path(recipe).stem}", grid, folder, jobs, force=force, json=json)
