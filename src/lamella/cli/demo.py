"""`lamella demo`: does the mixture earn its cost?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.studies import run_study

_QUICK = "run.limit={train: 320, validation: 100, test: 200}"


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the runs and the report.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A few hundred rows; scores then mean nothing.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each method.")] = 2,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes, one thread each; all cores if absent.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Compare MoLA with LoRA of equal size on MiniLM and TREC questions, with a floor, in minutes and on any laptop.

    It is `lamella compare demo`. Finished runs are kept: a demo that was interrupted goes on where it stopped.

    Example: lamella demo --seeds 3 -o runs/demo
    """
    from lamella.training.grid import read_grid
    from lamella.training.rows import StudyFolder

    grid = read_grid("demo", [f"seeds={seeds}", *[_QUICK] * quick])
    title = "lamella demo: what a mixture of experts is worth on TREC"
    run_study(title, grid, StudyFolder(output), jobs or os.cpu_count() or 1, force=force, json=json)
