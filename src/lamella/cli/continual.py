"""`lamella continual`: tasks learned one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.compare import compare


def continual(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="A recipe with a 'sequence' of tasks, and changes to it."),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; runs/RECIPE if absent.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Say how many hours it will take, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Let every method learn tasks one after the other; say what is kept of the earlier ones, and how sure that is.

    After each stage all tasks are scored: overall performance, backward transfer, performance drop, forgetting, and a
    curve for each task. An interrupted study goes on with the stage that it was in.

    Example: lamella continual continual-demo -o runs/one-after-the-other
    """
    from lamella.errors import LamellaError
    from lamella.lab.studies.continual import Continual
    from lamella.lab.studies.recipe import read_study

    recipes = [word for word in words if "=" not in word]
    if recipes and not isinstance(read_study(recipes[0]), Continual):
        raise LamellaError(f"The recipe '{recipes[0]}' has no 'sequence' of tasks. Give it to `lamella compare`.")
    compare(words, output, jobs, None, plan, force, json)
