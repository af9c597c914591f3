"""`lamella demo`: does the mixture earn its cost?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from lamella.cli.studies import run_study

# recipe, title of the page, and what makes it quick
_DEMOS = {
    "methods": (
        "demo",
        "lamella demo: what a mixture of experts gains on TREC",
        ("run.limit={train: 320, validation: 100, test: 200}",),
    ),
    "compose": (
        "demo-compose",
        "lamella compare demo-compose",
        ("rows=64", "test_rows=40", "lora.limit={train: 64, validation: 16, test: 16}"),
    ),
}


def demo(
    what: Annotated[
        Literal["methods", "compose"],
        typer.Argument(help="Methods side by side, or ways to compose LoRAs that are trained already."),
    ] = "methods",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder; runs/demo or runs/demo-compose if absent.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few hundred rows; scores then mean nothing.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each method.")] = 2,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes, one thread each; all cores if absent.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Compare MoLA and MoLEx with LoRA, or a learned composition with simple ones: in minutes, on any laptop.

    It is `lamella compare demo`, or `lamella compare demo-compose`. Finished runs are not repeated: a demo that was
    interrupted goes on where it stopped.

    Example: lamella demo compose --seeds 3 -o runs/composed
    """
    from lamella.lab.studies.recipe import read_study

    name, title, small = _DEMOS[what]
    recipe = read_study(name, [f"seeds={seeds}", *small * quick])
    run_study(title, recipe, output or Path("runs") / name, jobs or os.cpu_count() or 1, force=force, json=json)
