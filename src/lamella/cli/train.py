"""`lamella train`: one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.output import print_json, show_run
from lamella.cli.progress import showing

if TYPE_CHECKING:
    from lamella.lab.runs.settings import RunSettings


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe, and changes to its settings."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A demo model, a hub id or a path.")] = None,
    task: Annotated[str | None, typer.Option(help="A named task, hub:NAME or file:ROWS.")] = None,
    method: Annotated[
        str | None, typer.Option(help="lora, mola, molex, mole, full, head, ..., or a way to compose LoRAs.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the run.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Assert the run's effects and estimate its cost; train nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete an earlier run in that folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Fine-tune a model. An interrupted run goes on where it stopped; a finished one is never overwritten.

    Example: lamella train trec-mola lr=1e-3 method.num_experts=2-2-4-4 -o runs/narrow
    """
    from lamella.lab.runs.settings import resolve

    recipe, overrides = recipe_and_overrides(words or [])
    settings = resolve(recipe, overrides, model=model, task=task, method=method)
    carry_out(settings, output, check=check, force=force, json=json)


def carry_out(settings: RunSettings, output: Path | None, *, check: bool, force: bool, json: bool) -> None:
    """Train a run and show it; with ``check``, its preflight alone, exit status 1 if there is an error."""
    from lamella.lab.pages import run_report
    from lamella.lab.report.report import write_report
    from lamella.lab.runs.checks import preflight_of
    from lamella.lab.runs.run import train as run
    from lamella.progress import working

    if check:
        with showing(f"checking {settings.label}"):
            diagnosis = preflight_of(settings)
        if json:
            print_json(diagnosis.as_dict())
        else:
            typer.echo(str(diagnosis))
        raise typer.Exit(0 if diagnosis.ok else 1)
    with showing(settings.label):
        result = run(settings, output or Path("runs") / settings.label, force=force, controls=True)
        with working("writing the report"):
            write_report(run_report(result, settings), result.folder.path / "report.html")
    if json:
        print_json({"folder": str(result.folder.path), **result.metrics})
    else:
        show_run(result.metrics, result.folder.path)


def recipe_and_overrides(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The one word without ``=``, if any, and the others.

    Raises:
        LamellaError: more than one word has no ``=``.
    """
    from lamella.errors import LamellaError

    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise LamellaError(f"One recipe at a time: {' and '.join(recipes)} were given. Write settings as key=value.")
    return (recipes[0] if recipes else None), [word for word in words if "=" in word]
