"""`lamella similarity compress`: fewer experts, and tokens whose expert is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.similarity.subject import Json

BUDGETS = (0.97, 0.94, 0.875, 0.75, 0.5)


def compress(
    study: Annotated[Path, typer.Argument(help="Folder of a study with an alignment.")],
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share of the experts' parameters to keep; .97, .94, .875, .75, .5 if absent."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="similarity, random, usage or weight-distance; all if absent.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="What similarity goes by: identity_nmse, nmse, cka_distance or weight_distance; the first if absent, "
            "nmse behind aligners. May be repeated."
        ),
    ] = None,
    aligner: Annotated[
        str | None,
        typer.Option(
            help="Kind of aligner before replacements, one that was aligned: in rerouting and, with --replace, in the "
            "curve. If absent: linear or low-rank in rerouting, none in the curve."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Domains to measure on; the captured one if absent. May be repeated.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of those texts.")] = "test",
    documents: Annotated[int, typer.Option(min=2, help="Of each text, at most.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Of random merging.")] = 3,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replacements as they are, instead of merged experts.")
    ] = False,
    across_layers: Annotated[bool, typer.Option("--across-layers", help="One pool over neighbouring layers.")] = False,
    close: Annotated[int, typer.Option(min=0, help="Experts of each layer to close for rerouting; 0 for none.")] = 1,
    capacity: Annotated[
        int | None,
        typer.Option(min=0, help="Reroute also when closed experts take this many tokens of a sequence and no more."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="New folder for the model at the first budget, by the first method.")
    ] = None,
    json: Json = False,
) -> None:
    """Merge experts to a budget, beside random, usage-based and weight-distance merging; reroute tokens of closed ones.

    The model that --save writes is opened by lamella.similarity.Compressed.load.

    Example: lamella similarity compress runs/tiny --budget 0.9 --budget 0.75 --text news --text dialogue
    """
    from lamella.cli.similarity.subject import open_study, read_texts, telling
    from lamella.similarity import largest_compression
    from lamella.similarity.compression import METHODS, largest_in_words
    from lamella.similarity.steps import compress_to_budgets

    opened = open_study(study)
    domains = {name: read_texts(opened, name, split, documents) for name in text or [opened.subject.text]}
    with telling("compressing") as tell:
        curve, notes = compress_to_budgets(
            opened, domains, budget or BUDGETS, method or METHODS, measure or ["nmse"], aligner=aligner, seeds=seeds,
            replace=replace, across_layers=across_layers, close=close, capacity=capacity, save=save,
            measured_on=f"{split}, {documents} documents", tell=tell,
        )  # fmt: skip
    largest, path = largest_compression(curve, within=0.01), str(study / "compression.parquet")
    if json:
        print_json({"table": path, "within 1 %": largest.to_dict("records"), "notes": notes})
        return
    typer.echo("\n".join([*largest_in_words(largest), *(f"Note: {note}" for note in notes), f"Table: {path}"]))
