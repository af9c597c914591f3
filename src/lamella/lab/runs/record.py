"""What a run says of itself, computed again: its metrics from its predictions, and these from its model and rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import AutoTokenizer

from lamella.diagnostics.running import preserve_state
from lamella.errors import LamellaError, UnreadableError
from lamella.files import read_table
from lamella.findings import Examination
from lamella.lab.data import Task, encode
from lamella.lab.data.models import is_decoder
from lamella.lab.methods import Configured
from lamella.lab.runs.callbacks import routing_summary
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.rows import Rows
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.tasks import rows_used, task_of
from lamella.lab.runs.trained import find_trained
from lamella.lab.scoring import Columns, metrics_of, score
from lamella.tracing import FIRST_COLUMNS, RouterUse, routers_of

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 16
_DIFFERENCE = 1e-3  # in nats or units of the label: far above rounding, far below another model
_ALIKE = 0.9  # part of the rows; a token between two experts may go the other way in another batch
_EQUAL = 1e-6  # of the same arithmetic on the same numbers
_RESTORE = "restore it from a copy, or run it again with --force"


def examine_record(
    folder: Path, model: nn.Module, settings: RunSettings, examination: Examination
) -> list[RouterUse] | None:
    """Compares what the folder says with the model loaded from it, and its files with each other.

    Returns:
        What its trace says of each router; None where there is none to judge.
    """
    run, uses = RunFolder(folder), None
    _examine_method(model, settings, examination)
    if run.finished:
        uses = _examine_results(run, model, settings, examination)
    else:
        examination.saw("the run's record: not examined, the run is not finished")
    with _readable("digests.json", examination):
        _examine_digests(run, examination)
    return uses


def _examine_results(
    run: RunFolder, model: nn.Module, settings: RunSettings, examination: Examination
) -> list[RouterUse] | None:
    folder, uses = run.path, None
    with _readable("metrics.json", examination):
        metrics = run.metrics(as_left=False)
        _examine_names(metrics, settings, examination)
        try:
            task = task_of(settings)
        except LamellaError as error:
            task = None
            examination.saw(f"the run's predictions: not examined. {error}")
        if task is not None:
            with _readable("predictions.parquet", examination):
                saved = _examine_metrics(folder, task, metrics, examination)
                if saved is not None and _rows_are_the_runs(folder, task, examination):
                    _predict_again(folder, model, task, settings, saved, examination)
        with _readable("trace.parquet", examination):
            uses = _traced(folder, metrics, examination)
    return uses


@contextmanager
def _readable(name: str, examination: Examination) -> Iterator[None]:
    """What cannot be read is a finding, and the examination goes on."""
    try:
        yield
    except UnreadableError as error:
        why = "what the run reports cannot be compared with it"
        examination.error("unreadable", str(error), name, why, _RESTORE)


def _examine_method(model: nn.Module, settings: RunSettings, examination: Examination) -> None:
    """Whether the adapter is of the method that the run had."""
    method = settings.method
    configs = getattr(model, "peft_config", {}).values()
    if not isinstance(method, Configured) or not configs:
        return
    wanted, found = method.config().peft_type, [config.peft_type for config in configs]
    if wanted not in found:
        examination.error(
            "method-differs",
            f"the run is one of {method.name}, and its adapter is of the type {found[0]}",
            "run.yaml and the adapter",
            "the scores that the folder reports are not those of the model in it",
            "restore the folder from a copy, or run it again with --force",
        )


def _examine_names(metrics: Mapping[str, Any], settings: RunSettings, examination: Examination) -> None:
    said = {"method": settings.method.name, "seed": settings.seed, "settings": settings.digest_as_written}
    # an earlier edition kept no digest of the settings
    if unlike := [key for key, value in said.items() if metrics.get(key, value) != value]:
        examination.error(
            "record-differs",
            f"metrics.json and run.yaml are not of one run: they differ in {', '.join(unlike)}",
            "metrics.json and run.yaml",
            "the scores that the folder reports are not those of its settings",
            _RESTORE,
        )


def _rows_are_the_runs(folder: Path, task: Task, examination: Examination) -> bool:
    """Whether the task's rows are those of the run; also where it kept nothing to tell by."""
    with _readable("rows.parquet", examination):
        before, now = Rows.read(folder), Rows.of(task)
        if before is None:
            examination.saw("the run's rows: it keeps no digests of them, so whether they changed cannot be checked")
            return True
        changes = {split: before.changes(split, now) for split in sorted(before.whole.keys() | now.whole.keys())}
        examination.saw(f"the run's rows: {', '.join(changes)} compared with {task.name}")
        moved = {split: said for split, said in changes.items() if said}
        if moved:
            examination.warning(
                "rows-moved",
                f"the rows of {task.name} are not those of the run: "
                + "; ".join(f"{split}: {said}" for split, said in moved.items()),
                "rows.parquet",
                "its scores are of other rows, and rows that it was trained on may lie among those that test it",
                "restore the rows, or run it again with --force",
            )
        return not moved
    return False


def _examine_metrics(
    folder: Path, task: Task, metrics: Mapping[str, Any], examination: Examination
) -> pd.DataFrame | None:
    """The predictions, from which the metrics of each split were computed again; None of a run that scored nothing."""
    scored = [split for split in ("validation", "test") if split in metrics]
    if not scored:
        return None
    saved = read_table(folder / "predictions.parquet", "split")
    for split in scored:
        _compare_metrics(task, split, saved[saved["split"] == split], metrics[split], examination)
    return saved


def _predict_again(
    folder: Path,
    model: nn.Module,
    task: Task,
    settings: RunSettings,
    saved: pd.DataFrame,
    examination: Examination,
) -> None:
    split = "validation" if "validation" in task.splits else "test"
    encoded = encode(
        rows_used(task, split),
        _tokenizer(find_trained(folder).folder),
        max_length=settings.max_length,
        packing=settings.packing,
        decoder=is_decoder(model.config),
    )
    rows: Any = getattr(encoded, split)
    rows = rows.select(_first(rows))
    with preserve_state(model):
        columns = score(model, task, rows, encoded.collator, settings.eval_batch_size).columns
    unlike = _unlike(saved[saved["split"] == split], columns)
    if unlike.mean() > 1 - _ALIKE:
        examination.error(
            "saved-unequal",
            f"{int(unlike.sum())} of {len(unlike)} {split} rows are predicted otherwise than in the run",
            "predictions.parquet",
            "the adapter in the folder is not the model whose scores the folder reports",
            "restore the folder from a copy, or run it again with --force",
        )
    examination.saw(f"the run's predictions: {len(unlike)} {split} rows predicted again")


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged files make transformers and tokenizers raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnreadableError(f"The tokenizer in {folder} cannot be loaded: {reason}") from error


def _compare_metrics(task: Task, split: str, saved: pd.DataFrame, said: Any, examination: Examination) -> None:
    columns: Columns = {name: saved[name].to_numpy() for name in saved.columns if name != "split"}
    try:
        again = metrics_of(task, columns)
    except (LamellaError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        why = str(error) if isinstance(error, LamellaError) else f"{type(error).__name__}: {error}"
        raise UnreadableError(
            f"predictions.parquet holds no {split} predictions that can be scored ({why.rstrip('.')})."
        ) from error
    said = said if isinstance(said, Mapping) else {}
    unlike = [
        f"{split} {name} is {said.get(name)!r}, and by the predictions {value:.6g}"
        for name, value in again.items()
        if not (isinstance(number := said.get(name), int | float) and _same(number, value))
    ]
    if unlike:
        examination.error(
            "metrics-unlike",
            f"metrics do not follow from the predictions: {'; '.join(unlike)}",
            "metrics.json and predictions.parquet",
            "one of the two was changed after the run",
            _RESTORE,
        )
    examination.saw(f"the run's metrics: {split} computed again from {len(saved):,} predictions")


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_EQUAL, abs_tol=_EQUAL) or (math.isnan(one) and math.isnan(other))


def _traced(folder: Path, metrics: Mapping[str, Any], examination: Examination) -> list[RouterUse] | None:
    """What the trace says, if the run has routers; compared with what the metrics say of it."""
    said, path = metrics.get("routing"), folder / "trace.parquet"
    if said is None and not path.exists():
        return None
    frame = read_table(path, *FIRST_COLUMNS)
    if frame.empty:
        raise UnreadableError(f"{path} holds no trace: not one router. Restore it from a copy, or make it again.")
    try:
        uses, again = routers_of(frame), routing_summary(frame)
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableError(f"{path} holds no trace: {error}. Restore it from a copy, or make it again.") from error
    said = said if isinstance(said, Mapping) else {}
    if unlike := [
        name
        for name, value in again.items()
        if not (isinstance(number := said.get(name), int | float) and _same(number, value))
    ]:
        examination.error(
            "metrics-unlike",
            f"the routing in metrics.json does not follow from the trace: {', '.join(unlike)}",
            "metrics.json and trace.parquet",
            "one of the two was changed after the run",
            _RESTORE,
        )
    return uses


def _examine_digests(run: RunFolder, examination: Examination) -> None:
    changed = run.changed()
    if changed is None:
        examination.saw("the run's files: it keeps no digests of them, so whether they changed cannot be checked")
        return
    found = " ".join(finding.where for finding in examination.findings if finding.severity == "error")
    if named := {name: fate for name, fate in changed.items() if Path(name).name not in found}:
        examination.error(
            "changed-since",
            "; ".join(f"{name} {fate}" for name, fate in named.items()),
            sorted(named),
            "the folder is not what the run left",
            _RESTORE,
        )
    examination.saw("the run's files: compared with the digests that were written beside them")


def _first(rows: Dataset) -> list[int]:
    """The first rows; of a question with several options all or none."""
    if "choice" in rows.column_names:
        return [index for index, question in enumerate(rows["row"]) if question < _ROWS // 4]
    return list(range(min(_ROWS, len(rows))))


def _unlike(saved: pd.DataFrame, columns: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    name = "nll" if "nll" in columns else "prediction"
    if len(saved) < len(columns[name]) or name not in saved or saved[name].dtype.kind not in "fiu":
        raise UnreadableError(f"predictions.parquet does not hold {len(columns[name])} numbers '{name}'.")
    before = saved[name].to_numpy()[: len(columns[name])]
    return ~(np.abs(before - columns[name]) <= _DIFFERENCE * np.maximum(1.0, np.abs(before)))
