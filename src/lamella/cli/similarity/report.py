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

# each table of the page, and the step that makes it
_MADE_BY = {
    "screen": "screen",
    "alignment": "align",
    "swap": "swap",
    "shifts": "swap",
    "compression": "compress",
    "rerouting": "compress",
    "histogram": "capture",
    "plane": "capture",
}
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
    from lamella.cli.similarity.arms import noted_arms
    from lamella.lab.report.similarity import SimilarityReport, write_similarity
    from lamella.similarity.study import StudyFolder
    from lamella.similarity.swapping import distance_regressions

    folder = StudyFolder(study)
    subject, capture = folder.subject(), folder.captured()
    stale = [name for name in _MADE_BY if folder.is_stale(name)]
    tables = {name: None if name in stale else folder.table(name) for name in _MADE_BY}
    alignment = tables["alignment"]
    arms = {} if alignment is None else noted_arms(folder)
    page = SimilarityReport(
        title=f"Expert similarity of {subject.model} on {subject.text}",
        routing=capture.routing,
        controls={} if alignment is None else _controls(alignment, tables["screen"]),
        distance=None if tables["swap"] is None else distance_regressions(tables["swap"]),
        settings={
            "study": asdict(subject),
            "capture": _said(capture),
            "alignment": {name: _without_notes(arm) for name, arm in arms.items()},
        },
        notes=[*_out_of_date(stale, study), *_noted(arms), *_missing(capture)],
        **tables,
    )
    write_similarity(page, folder.report)
    if json:
        print_json({"report": str(folder.report)})
    else:
        typer.echo(f"Report: {folder.report}")


def _controls(alignment: pd.DataFrame, screened: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """What the numbers of an alignment have to be compared with, by caption."""
    import pandas as pd

    from lamella.similarity.reliability import control_table, worth

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


def _noted(arms: dict[str, dict[str, Any]]) -> list[str]:
    """What alignments skipped and why, and which were scored on another text than the captured one."""
    notes = dict.fromkeys(note for arm in arms.values() for note in arm["notes"])
    elsewhere = [name for name, arm in arms.items() if arm["score_on"] is not None]
    return [
        *(f"The errors of the aligner {name} are on that text, not on the captured one." for name in elsewhere),
        *notes,
    ]


def _out_of_date(stale: list[str], study: Path) -> list[str]:
    return [
        f"{name}.parquet was made from another capture than the one that is there now, so it is left out; run "
        f"`lamella similarity {_MADE_BY[name]} {study}` again."
        for name in stale
    ]


def _missing(capture: Any) -> list[str]:
    wanted = capture.manifest.per_expert
    return [
        f"Layer {layer}, expert {expert} has fewer than the {wanted} samples asked for."
        for layer, expert in capture.short(wanted)
    ]
