"""`lamella similarity damages`: what it costs to serve a batch with fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json


def damages(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    json: Json = False,
) -> None:
    """Write what it costs to give a token of one expert to another of its layer; `reroute` serves by that table.

    Example: lamella similarity damages runs/tiny
    """
    from lamella.cli.similarity.subject import open_study
    from lamella.similarity.steps import measure_damages

    opened = open_study(study)
    with showing("measuring damages"):
        table, path = measure_damages(opened), str(study / "damages.parquet")
    best = table.groupby(["source_layer", "source_expert"])["damage"].min().groupby("source_layer").median()
    if json:
        print_json({"table": path, "pairs": len(table), "medians": {str(at): one for at, one in best.items()}})
        return
    listed = ", ".join(f"layer {layer} {damage:.3g}" for layer, damage in best.items())
    typer.echo(
        f"{len(table):,} ordered pairs. Squared error of the output, per squared weight of a token, when its expert's "
        f"best other one takes its place, at the median expert: {listed}. Serve by it: lamella.similarity.reroute(..., "
        f'what="limited", limit=..., damage=pandas.read_parquet("{path}")).\nTable: {path}'
    )
