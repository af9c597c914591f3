"""`lamella similarity screen`: what needs no training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import console, print_json
from lamella.cli.similarity.subject import Json

_MOST_PAIRS = 20_000  # of which hidden units are matched unasked
_QUICK = ("floor", "cka_distance")


def screen(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="floor, cka_distance, weight_distance or coactivation; may be repeated. All if absent; of more than "
            f"{_MOST_PAIRS:,} pairs floor and cka_distance."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare every ordered pair of experts without training: floor, CKA, matched weights, co-activation.

    Example: lamella similarity screen studies/tiny
    """
    from lamella.cli.similarity.subject import open_study
    from lamella.similarity import screen as screened
    from lamella.similarity.screening import MEASURES

    opened = open_study(study)
    pairs = len(opened.capture.experts) * (len(opened.capture.experts) - 1)
    measures = measure or list(MEASURES if pairs <= _MOST_PAIRS else _QUICK)
    left_out = [name for name in MEASURES if name not in measures]
    if measure is None and left_out:
        typer.echo(
            f"{pairs:,} pairs: {' and '.join(left_out)} left out; name every measure with --measure to have them.",
            err=True,
        )
    with console.status("screening"):
        table = screened(opened.capture, opened.model, measures=measures)
    path = opened.folder.write("screen", table)
    medians = {name: float(table[name].median()) for name in measures}
    facts = {
        "table": str(path),
        "pairs": len(table),
        "not measured": int((table["held_out"] < 2).sum()) if {*_QUICK} & {*measures} else 0,
        "medians": medians,
    }
    if json:
        print_json(facts)
        return
    listed = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in medians.items())
    typer.echo(
        f"{len(table):,} ordered pairs, {facts['not measured']:,} of them without samples. At the median: {listed}. "
        f"No aligner can explain more than all but the floor.\nTable: {path}"
    )
