"""`lamella build`: a model with a mixture of experts, made from demo assets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.output import console, print_json


def build(
    name: Annotated[str, typer.Argument(help="tiny-moe, smollm2-experts or switch-trec.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe's settings.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; runs/NAME if absent.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what lies in that folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Make a mixture of experts to study, where no hub is at hand: train it here, and say what it is worth.

    tiny-moe is trained from scratch on four kinds of prose. smollm2-experts is SmolLM2 with experts of which it is
    known what each was trained on. switch-trec classifies questions. The folder holds the model as transformers saves
    it, and log.json. Exit status 1 if the model is not what its recipe promises.

    Example: lamella build tiny-moe -o models/tiny-moe
    """
    from lamella.cli.progress import Bar
    from lamella.lab.building import build as make

    folder, bar = output or Path("runs") / name, Bar()
    try:
        log = make(name, folder, changes or [], force=force, callbacks=[bar])
    finally:
        bar.close()
    if json:
        print_json({"folder": str(folder), **log})
    else:
        _show(log, folder)
    raise typer.Exit(1 if log["failed"] else 0)


def _show(log: dict[str, Any], folder: Path) -> None:
    """The figures of the log that are one number each, what failed, and where the model lies."""
    for figure in ("test_perplexity", "test_accuracy"):
        for name, value in log.get(figure, {}).items():
            console.print(f"{figure.replace('_', ' ')} of {name}: {_overall(value):.4g}", highlight=False)
    console.print(f"smallest share of an expert in its layer: {log['smallest_share']:.3f}", highlight=False)
    for sentence in log["failed"]:
        console.print(sentence, style="red", highlight=False)
    console.print(f"{sum(log['seconds'].values()):.0f} s. Kept in {folder}", highlight=False)


def _overall(value: float | dict[str, float]) -> float:
    return value["all"] if isinstance(value, dict) else value
