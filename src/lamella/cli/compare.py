"""`lamella compare`: methods side by side, fairly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.studies import run_study, show_plan
from lamella.cli.train import recipe_and_overrides


def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="A recipe of a study, and changes to it."),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; runs/RECIPE if absent.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Work on a Ray cluster in place of processes: 'auto', an address, or 'local'."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say how many hours it will take and which differences it can tell, and stop."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Train every method on every backbone and task with every seed; say which are better, and how sure that is.

    A recipe with 'sources' trains a LoRA for each of them and compares ways to compose these. In place of a recipe, the
    folder of a study goes on with that one. methods.NAME=null leaves a method of the recipe out.

    A study that was interrupted goes on where it stopped, and equal settings are trained once. Exit status 1 if a cell
    could not be run.

    Example: lamella compare demo seeds=3 --jobs 2 -o runs/shapes
    """
    from lamella.errors import LamellaError
    from lamella.lab.studies.recipe import read_study

    recipe, overrides = recipe_and_overrides(words)
    if recipe is None:
        raise LamellaError("Name the recipe of a study: the packaged demo, or a YAML file.")
    study, name = read_study(recipe, overrides), Path(recipe).stem
    path = output or (Path(recipe) if Path(recipe).is_dir() else Path("runs") / name)
    if plan:
        show_plan(study, path, jobs, json=json)
    else:
        run_study(f"lamella compare {name}", study, path, jobs, ray, force=force, json=json)
