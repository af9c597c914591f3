"""`lamella similarity compress`: fewer experts, and tokens whose expert is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing
from lamella.cli.similarity.subject import Json

BUDGETS = (0.97, 0.94, 0.875, 0.75, 0.5)


def compress(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of the experts to keep; .97, .94, .875, .75, .5 if absent.")
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            help="Which experts go first, such as reap, reconstruction, stand-in, merge, random; may be "
            "repeated. A dozen, beside random, if absent."
        ),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="model: the cheapest experts of the whole model go; layer: as many of each layer.")
    ] = "model",
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Fit the down-projections that are left to the whole layer.")
    ] = True,
    distil: Annotated[
        int | None,
        typer.Option(min=0, help="Passes in which routers learn from the whole model; 1 with scope layer if absent."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Domains to measure on; the captured one if absent. May be repeated.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of those texts.")] = "test",
    documents: Annotated[int, typer.Option(min=2, help="Of each text, at most.")] = 64,
    within: Annotated[float, typer.Option(min=0, help="Rise of perplexity that is allowed.")] = 0.05,
    seeds: Annotated[int, typer.Option(min=1, help="Of the criterion random.")] = 3,
    close: Annotated[int, typer.Option(min=0, help="Experts of each layer to close for rerouting; 0 for none.")] = 1,
    capacity: Annotated[
        int | None,
        typer.Option(min=0, help="Reroute also when closed experts take this many tokens of a sequence and no more."),
    ] = None,
    aligner: Annotated[
        str | None,
        typer.Option(help="Kind of aligner in rerouting, one that was aligned; linear or low-rank if absent."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="New folder for the model at the first budget, by the first criterion.")
    ] = None,
    json: Json = False,
) -> None:
    """Say how many experts can go at which cost, which they are, by every criterion beside chance; write the model.

    Where every layer keeps as many experts and the routers are cut, any program that reads the family opens what --save
    writes; otherwise lamella.similarity.Compressed.load does.

    Example: lamella similarity compress runs/tiny --budget 0.75 --text news --text dialogue --save runs/smaller
    """
    from lamella.cli.similarity.subject import open_study, read_texts
    from lamella.similarity.compression import CURVES, Saved, Settings, advised, verdict
    from lamella.similarity.steps import compress_to_budgets

    opened = open_study(study)
    budgets, criteria = budget or BUDGETS, criterion or CURVES
    with showing("compressing"):
        domains = {name: read_texts(opened, name, split, documents) for name in text or [opened.subject.text]}
        captured = list(read_texts(opened, None, opened.subject.split, documents))
        curve, notes = compress_to_budgets(
            opened, domains, captured, budgets, criteria,
            Settings(scope=scope, refit=refit, distil=distil),  # type: ignore[arg-type]  # an unknown scope is refused there
            aligner=aligner, seeds=seeds, close=close, capacity=capacity, save=save,
            measured_on=f"{split}, {documents} documents",
        )  # fmt: skip
    sentences, path = verdict(curve, within), str(study / "compression.parquet")
    saved = None if save is None else Saved.read(save)
    if json:
        print_json(
            {"table": path, "verdict": sentences, "notes": notes, "saved": None if saved is None else saved.as_dict()}
        )
        return
    typer.echo("\n".join([*sentences, *(f"Note: {note}" for note in notes), f"Table: {path}"]))
    if saved is not None:
        typer.echo(str(saved))
    elif (chosen := advised(curve, within)) is not None:
        typer.echo(
            f"Write that model: lamella similarity compress {study} --budget {chosen[1]:g} --criterion {chosen[0]} "
            f"--scope {scope}{'' if refit else ' --no-refit'}"
            f"{'' if distil is None else f' --distil {distil}'} --save FOLDER"
        )
