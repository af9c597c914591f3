"""`lamella similarity screen`: what needs no training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import console, print_json
from lamella.cli.similarity.subject import Json


def screen(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    json: Json = False,
) -> None:
    """Compare every ordered pair of experts without training: floor, CKA, matched weights, co-activation.

    Example: lamella similarity screen studies/tiny
    """
    from lamella.cli.similarity.subject import open_study
    from lamella.similarity import screen as screened

    opened = open_study(study)
    with console.status("screening"):
        table = screened(opened.capture, opened.model)
    path = opened.folder.write("screen", table)
    measured = table.dropna(subset=["floor"])
    facts = {
        "table": str(path),
        "pairs": len(table),
        "not measured": len(table) - len(measured),
        "median floor": float(measured["floor"].median()),
    }
    if json:
        print_json(facts)
        return
    typer.echo(
        f"{len(table):,} ordered pairs, {facts['not measured']:,} of them without samples. No aligner can explain more "
        f"than all but the floor: at the median {facts['median floor']:.1%} stays unexplained.\nTable: {path}"
    )
