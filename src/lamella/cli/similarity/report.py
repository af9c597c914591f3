"""`lamella similarity report`: the page of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json


def report(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    json: Json = False,
) -> None:
    """Write one page of all that was measured, with controls. It opens offline.

    Example: lamella similarity report runs/tiny
    """
    from lamella.lab.report.similarity import write_report

    with showing("writing the report"):
        path = str(write_report(study))
    if json:
        print_json({"report": path})
    else:
        typer.echo(f"Report: {path}")
