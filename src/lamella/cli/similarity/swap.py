"""`lamella similarity swap`: what a swap costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json


def swap(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    unit: Annotated[
        list[str] | None, typer.Option(help="expert, router, router+experts or block; may be repeated.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="For experts: two layers, such as 0,2; the first and the last if absent.")
    ] = None,
    one_way: Annotated[
        bool, typer.Option("--one-way", help="The second takes the first's place only, for every pair in both orders.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="To measure on; the captured one's other split if absent.")] = None,
    split: Annotated[str, typer.Option(help="Of that text.")] = "test",
    documents: Annotated[int, typer.Option(min=2, help="To measure on, at most.")] = 64,
    metric: Annotated[str, typer.Option(help="nll (nats per token) or accuracy.")] = "nll",
    json: Json = False,
) -> None:
    """Put experts, routers or blocks in each other's place and measure, with intervals. Goes on where it stopped.

    Example: lamella similarity swap runs/tiny --unit block --unit router+experts
    """
    from lamella.cli.similarity.subject import open_study, read_texts
    from lamella.similarity.steps import swap_parts
    from lamella.similarity.swapping import distance_regressions, regression_in_words

    opened = open_study(study)
    with showing("swapping"):
        texts = read_texts(opened, text, split, documents)
        table = swap_parts(opened, texts, unit or ["router+experts", "block"], layers, one_way, metric)
    regressions, path = distance_regressions(table), str(study / "swap.parquet")
    if json:
        print_json({"table": path, "swaps": len(table), "distance": regressions})
        return
    sentences = [regression_in_words(name, regression) for name, regression in regressions.items()]
    typer.echo("\n".join([*sentences, f"{len(table)} swaps. Table: {path}"]))
