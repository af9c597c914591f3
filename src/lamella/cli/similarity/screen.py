"""`lamella similarity screen`: what needs no training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json


def screen(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="predicted, floor, cka_distance, weight_distance or coactivation; may be repeated. All if absent; of "
            "more than 20,000 pairs floor and cka_distance."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare every ordered pair of experts without training: predicted error, floor, CKA, weights, co-activation.

    Example: lamella similarity screen runs/tiny
    """
    from lamella.cli.similarity.subject import open_study
    from lamella.similarity.screening import MEASURES, QUICK_MEASURES, default_measures
    from lamella.similarity.steps import screen_pairs

    opened = open_study(study)
    pairs = len(opened.capture.experts) * (len(opened.capture.experts) - 1)
    measures = measure or default_measures(pairs)
    left_out = [name for name in MEASURES if name not in measures]
    if measure is None and left_out:
        typer.echo(
            f"{pairs:,} pairs: {', '.join(left_out)} left out; name every measure with --measure to have them.",
            err=True,
        )
    with showing("screening"):
        table = screen_pairs(opened, measures)
    medians = {name: float(table[name].median()) for name in measures}
    of_outputs = {"predicted", *QUICK_MEASURES} & {*measures}
    unmeasured = int((table["held_out"] < 2).sum()) if of_outputs else 0
    path = str(study / "screen.parquet")
    if json:
        print_json({"table": path, "pairs": len(table), "not measured": unmeasured, "medians": medians})
        return
    listed = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in medians.items())
    typer.echo(
        f"{len(table):,} ordered pairs, {unmeasured:,} of them without samples. At the median: {listed}. "
        f"No aligner can explain more than all but the floor.\nTable: {path}"
    )
