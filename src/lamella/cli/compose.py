"""`lamella compose`: trained LoRAs, mixed by routers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.train import carry_out


def compose(
    task: Annotated[str, typer.Option(help="What the routers learn from: a named task, hub:NAME or file:ROWS.")],
    adapters: Annotated[
        list[str], typer.Option(help="Two or more trained LoRAs: runs, PEFT folders, LoRA files or hub ids.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]PLACE... [KEY=VALUE]...", help="The other LoRAs, and settings of the run."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The LoRAs' base; what the first one names if absent.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the run.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Assert the run's effects and estimate its cost; train nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete an earlier run in that folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Compose LoRAs that are trained already: routers learn how much each counts, and nothing else but a new head does.

    Settings are those of `lamella train` with the method mole, such as method.granularity=network; lr is 3e-4 if
    absent. Afterwards the LoRAs' mean and each LoRA alone are scored on the same rows, a pass for each.

    Example: lamella compose --adapters books=runs/books dvd=runs/dvd --task blitzer -o runs/both
    """
    from lamella.lab.runs.composition_settings import composed_settings, split_words

    loras, overrides = split_words([*adapters, *(words or [])])
    settings = composed_settings(loras, task, overrides, model)
    carry_out(settings, output, check=check, force=force, json=json)
