"""`lamella doctor`: does it do what it claims?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing


def doctor(
    path: Annotated[Path, typer.Argument(help="Folder of a run, an adapter or a study.")],
    base: Annotated[
        str | None, typer.Option(help="Base model: a demo model, a hub id or a path; the adapter's if absent.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Look for faults in a run, an adapter or a study, and say what was looked at. Exit status 1 if there are any.

    Example: lamella doctor runs/minilm-trec-mola-seed0
    """
    from lamella.diagnostics.doctor import doctor as examine

    with showing("examining"):
        diagnosis = examine(path, base)
    if json:
        print_json(diagnosis.as_dict())
    else:
        typer.echo(str(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)
