"""The page of a study, from what its steps left in the folder."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from lamella.lab.report.similarity.page import SimilarityReport, write_similarity
from lamella.similarity.activations import Capture
from lamella.similarity.alignment.table import by_aligner, label
from lamella.similarity.reliability import control_table, reliability, screen_table
from lamella.similarity.study import StudyFolder
from lamella.similarity.swapping import distance_regressions

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
    "share and variance": "rank correlation of the normalised error with it",
    "samples per parameter": "training samples per parameter of an aligner",
    "ceiling": "seed ceiling: one seed ranks pairs as the others do",
    "ceiling within": "seed ceiling within an expert's replacements",
    "below the floor": "pairs whose error lies below the floor",
}


def write_report(path: Path) -> Path:
    """Writes the page of all that was measured in a study; tables of another capture are left out, and it says so.

    Raises:
        LamellaError: no study lies there, or its capture is not finished.
    """
    folder = StudyFolder(path)
    subject, capture = folder.subject(), folder.captured()
    stale = [name for name in _MADE_BY if folder.is_stale(name)]
    tables = {name: None if name in stale else folder.table(name) for name in _MADE_BY}
    alignment = tables["alignment"]
    aligned = [] if alignment is None else folder.aligned()
    page = SimilarityReport(
        title=f"Expert similarity of {subject.model} on {subject.text}",
        routing=capture.routing,
        controls={} if alignment is None else _controls(alignment, tables["screen"]),
        distance=None if tables["swap"] is None else distance_regressions(tables["swap"]),
        settings={"study": asdict(subject), "capture": _captured(capture), "alignment": _settings(aligned)},
        notes=[*_out_of_date(stale, path), *_notes(aligned), *_missing(capture)],
        **tables,
    )
    write_similarity(page, folder.report)
    return folder.report


def _controls(alignment: pd.DataFrame, screened: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """What the numbers of an alignment have to be compared with, by caption."""
    tables = {}
    for name, rows in by_aligner(alignment).items():
        table = control_table(rows)
        ends = list(zip(table["low"], table["high"], strict=True))
        tables[f"Normalised error, aligner {name}"] = table.drop(columns=["low", "high"]).assign(
            **{"5 % to 95 %": ends}
        )
        facts = [(_WORDS[fact], value) for fact, value in reliability(rows, screened).items()]
        tables[f"How far the numbers can be relied on, aligner {name}"] = pd.DataFrame(facts, columns=["fact", "value"])
        if screened is not None:
            tables[f"How well the screen finds an expert's replacements, aligner {name}"] = _screened(rows, screened)
    return tables


def _screened(rows: pd.DataFrame, screened: pd.DataFrame) -> pd.DataFrame:
    table = screen_table(rows, screened)
    ranks = {"within": "rank correlation within an expert's replacements", "all": "over all pairs"}
    lost = {name: f"error {name}" for name in table.columns if name.startswith("lost")}
    named = table["measure"].str.replace("_", " ")
    return table.assign(measure=named).rename(columns={**ranks, **lost})


def _captured(capture: Capture) -> dict[str, Any]:
    shown = ("origin", "rows_done", "tokens", "per_expert", "seed", "dtype", "model", "tokenizer")
    return {name.replace("_", " "): getattr(capture.manifest, name) for name in shown}


def _settings(aligned: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each aligner by name."""
    aside = ("aligner", "scored_on", "notes")
    return {
        label(one["aligner"], one["scored_on"]): {name: value for name, value in one.items() if name not in aside}
        for one in aligned
    }


def _notes(aligned: Sequence[dict[str, Any]]) -> list[str]:
    """What alignments skipped and why, and which were scored on another text than the captured one."""
    elsewhere = [label(one["aligner"], one["scored_on"]) for one in aligned if one["score_on"] is not None]
    return [
        *(f"The errors of the aligner {name} are on that text, not on the captured one." for name in elsewhere),
        *dict.fromkeys(note for one in aligned for note in one["notes"]),
    ]


def _out_of_date(stale: list[str], study: Path) -> list[str]:
    return [
        f"{name}.parquet was made from another capture than the one that is there now, so it is left out; run "
        f"`lamella similarity {_MADE_BY[name]} {study}` again."
        for name in stale
    ]


def _missing(capture: Capture) -> list[str]:
    wanted = capture.manifest.per_expert
    return [
        f"Layer {layer}, expert {expert} has fewer than the {wanted} samples asked for."
        for layer, expert in capture.short(wanted)
    ]
