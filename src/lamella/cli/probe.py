"""`lamella probe`: which layers of a model hold which properties of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.output import print_json
from lamella.cli.progress import showing


def probe(
    model: Annotated[str, typer.Argument(help="A demo model, a hub id or a path.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of results.parquet and report.html.")],
    run: Annotated[
        list[Path] | None,
        typer.Option(
            help="A finished run of MoLEx on the model, for what it picks; repeated, the same with other seeds."
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="A task or file:ROWS with a text in each row, English.")] = "trec",
    rows: Annotated[int, typer.Option(min=1, help="Rows of each property, at most.")] = 2000,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say which layers hold surface, syntactic and semantic properties, and whether a MoLEx's picks follow them.

    A linear probe reads each property from every layer, with a control task beside it: selectivity is what is left
    when the control's accuracy is taken away. About three minutes for minilm.

    Example: lamella probe minilm -o runs/probe

    Example: lamella probe minilm --run runs/molex -o runs/probe-picks
    """
    from lamella.cli.similarity.subject import placed
    from lamella.lab.probing.model import probe_model
    from lamella.lab.report.probing import probing_sentences, write_probing
    from lamella.lab.robustness.comparison import check_folder
    from lamella.progress import working

    check_folder(output)
    with showing("probing"):
        probed = probe_model(placed(model), placed(text), rows, run or ())
        with working("writing the report"):
            probed.save(output)
            page = write_probing(probed, output / "report.html")
    if json:
        print_json({"folder": str(output), **probed.as_dict()})
    else:
        notes = [f"Note: {note}" for note in probed.notes]
        typer.echo("\n".join([*probing_sentences(probed), *notes, f"Report: {page}"]))
