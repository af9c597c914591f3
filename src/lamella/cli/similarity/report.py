"""`lamella similarity report`: the page of a study."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamella.cli.output import print_json
from lamella.cli.similarity.subject import Json

if TYPE_CHECKING:
    import pandas as pd

_WORDS = {
    "beyond": "share of pairs better than the mean, no aligner and a random expert",
    "raw and variance": "rank correlation of the raw error with the replaced expert's variance",
    "share and variance": "rank correlation of the unexplained share with it",
    "samples per parameter": "training samples per parameter of an aligner",
    "ceiling": "seed ceiling: one seed ranks pairs as the others do",
    "ceiling within": "seed ceiling within an expert's stand-ins",
    "floor": "the floor ranks an expert's stand-ins",
    "cka_distance": "CKA ranks them",
    "weight_distance": "matched weights rank them",
    "below the floor": "pairs whose error lies below the floor",
}


def report(
    study: Annotated[Path, typer.Argument(help="Folder of a study with a capture.")],
    json: Json = False,
) -> None:
    """Write one page of all that was measured, with controls. It opens offline.

    Example: lamella similarity report studies/tiny
    """
    from lamella.reporting.similarity import SimilarityReport, write_similarity
    from lamella.similarity.capture import Capture
    from lamella.similarity.study import StudyFolder

    folder = StudyFolder(study)
    subject = folder.subject()
    capture = Capture.load(folder.capture)
    alignment, screened = folder.table("alignment"), folder.table("screen")
    noted = folder.facts("alignment") or {}
    page = SimilarityReport(
        title=f"Expert similarity of {subject.model} on {subject.text}",
        routing=capture.routing,
        shifts=folder.table("shifts"),
        screen=screened,
        alignment=alignment,
        controls={} if alignment is None else _controls(alignment, screened),
        swap=folder.table("swap"),
        distance=folder.facts("distance"),
        compression=folder.table("compression"),
        rerouting=folder.table("rerouting"),
        histogram=folder.table("histogram"),
        plane=folder.table("plane"),
        settings={"study": asdict(subject), "capture": _said(capture), "alignment": _without_notes(noted)},
        notes=[*noted.get("notes", []), *_missing(capture)],
    )
    write_similarity(page, folder.report)
    if json:
        print_json({"report": str(folder.report)})
    else:
        typer.echo(f"Report: {folder.report}")


def _controls(alignment: pd.DataFrame, screened: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """What the numbers of an alignment have to be compared with, by caption."""
    import pandas as pd

    from lamella.similarity.worth import control_table, worth

    tables = {}
    for kind, rows in alignment.groupby("aligner", sort=False):
        table = control_table(rows)
        ends = list(zip(table["low"], table["high"], strict=True))
        shown = table.drop(columns=["low", "high"]).assign(**{"5 % to 95 %": ends})
        tables[f"Unexplained share, aligner {kind}"] = shown
        facts = [(_WORDS[name], value) for name, value in worth(rows, screened).items()]
        tables[f"What the numbers are worth, aligner {kind}"] = pd.DataFrame(facts, columns=["fact", "value"])
    return tables


def _said(capture: Any) -> dict[str, Any]:
    manifest = capture.manifest
    shown = ("origin", "rows_done", "tokens", "per_expert", "seed", "dtype", "model", "tokenizer")
    return {name.replace("_", " "): getattr(manifest, name) for name in shown}


def _without_notes(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "notes"}


def _missing(capture: Any) -> list[str]:
    wanted = capture.manifest.per_expert
    return [
        f"Layer {layer}, expert {expert} has fewer than the {wanted} samples asked for."
        for layer, expert in capture.short(wanted)
    ]
