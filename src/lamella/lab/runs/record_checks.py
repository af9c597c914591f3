"""What a run says of itself, held against what its files do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from lamella.diagnostics.undisturbed import undisturbed
from lamella.errors import LamellaError
from lamella.findings import Examination
from lamella.lab.data import encode, load_backbone
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.scoring import score
from lamella.lab.runs.tasks import task_of

if TYPE_CHECKING:
    from datasets import Dataset

    from lamella.lab.runs.settings import RunSettings

_ROWS = 16
_DIFFERENCE = 1e-3  # in nats or units of the label: far above rounding, far below another model
_ALIKE = 0.9  # part of the rows; a token between two experts may go the other way in another batch


def examine_record(folder: Path, model: nn.Module, settings: RunSettings, examination: Examination) -> None:
    """Compares the folder's metrics and predictions with the model loaded from it."""
    run = RunFolder(folder)
    if not run.finished:
        examination.saw("the run's own record: not examined, the run is not finished")
        return
    try:
        examination.saw(_examine_predictions(folder, model, settings, examination))
    except LamellaError as error:
        examination.saw(f"the run's predictions: not examined. {error}")


def _examine_predictions(folder: Path, model: nn.Module, settings: RunSettings, examination: Examination) -> str:
    path = folder / "predictions.parquet"
    if not path.is_file():
        return "the run's predictions: not examined, the run kept none"
    kept = pd.read_parquet(path)
    task = task_of(settings)
    backbone = load_backbone(settings.model, task)
    encoded = encode(
        task, backbone.tokenizer, max_length=settings.max_length, packing=settings.packing, decoder=backbone.decoder
    )
    split = "validation" if encoded.validation is not None else "test"
    rows: Any = encoded.validation if encoded.validation is not None else encoded.test
    rows = rows.select(_first(rows))
    with undisturbed(model):
        columns = score(model, task, rows, encoded.collator, settings.eval_batch_size).columns
    unlike = _unlike(kept[kept["split"] == split], columns)
    if unlike.mean() > 1 - _ALIKE:
        _report(
            f"{int(unlike.sum())} of {len(unlike)} {split} rows are predicted otherwise than in the run",
            examination,
        )
    return f"the run's predictions: {len(unlike)} {split} rows predicted again"


def _first(rows: Dataset) -> list[int]:
    """The first rows; of a question with several options all or none."""
    if "choice" in rows.column_names:
        return [index for index, question in enumerate(rows["row"]) if question < _ROWS // 4]
    return list(range(min(_ROWS, len(rows))))


def _unlike(kept: pd.DataFrame, columns: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    name = "nll" if "nll" in columns else "prediction"
    before = kept[name].to_numpy()[: len(columns[name])]
    return np.abs(before - columns[name]) > _DIFFERENCE * np.maximum(1.0, np.abs(before))


def _report(what: str, examination: Examination) -> None:
    examination.error(
        "saved-unequal",
        what,
        "predictions.parquet",
        "the adapter in the folder is not the model whose scores the folder reports",
        "restore the folder from a copy, or run it again with --force",
    )
