"""A study of composition on disk: its runs, the backbone with each head, and what everything answers on every test."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from lamella.data import load_backbone
from lamella.training.composition.answers import answers
from lamella.training.composition.grid import HEAD, CompositionGrid, StagedCell, Stages, base_folder
from lamella.training.doctor import doctor
from lamella.training.folder import RunFolder
from lamella.training.grid import Cell
from lamella.training.rows import StudyFolder
from lamella.training.run import train
from lamella.training.tasks import task_of
from lamella.training.workers import work, work_in_processes
from lamella.writing import whole, write_whole


@dataclass(frozen=True)
class CompositionFolder(StudyFolder):
    """A study's folder; beside its runs, ``bases/KEY`` of every head and ``answers/KEY.parquet`` of every cell.

    Attributes:
        tests: the tasks that every cell answers, by name.
        test_rows: of each; all where None.
    """

    tests: Mapping[str, str]
    test_rows: int | None

    def answers(self, key: str) -> Path:
        """What a cell's model answered: test, row, label and log-probabilities."""
        return self.path / "answers" / f"{key}.parquet"

    def train(self, cell: Cell, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Run a claimed cell to its end, let its model answer every test, and write its row."""
        started = time.perf_counter()
        run = RunFolder(self.run(cell.key))
        metrics = run.metrics() if run.finished else train(cell.settings, run.path, callbacks=callbacks).metrics
        if cell.method == HEAD:
            self._keep_base(cell)
        found = answers(cell.settings, run.path, self.tests, self.test_rows)
        with whole(self.answers(cell.key)) as unfinished:
            found.to_parquet(unfinished, index=False)
        seconds = max(time.perf_counter() - started, metrics["train_seconds"])
        row = {"settings": cell.settings.model_dump(mode="json"), "seconds": seconds, "metrics": metrics}
        # what was not trained has nothing to examine, and PEFT's X-LoRA cannot be loaded as doctors do
        if metrics["steps"] and cell.settings.method.resumes:
            row["diagnosis"] = doctor(run.path).as_dict()
        write_whole(self._row(cell.key), json.dumps(row))

    def _keep_base(self, cell: Cell) -> None:
        """The backbone with a trained head as one model, which the LoRAs of that seed are trained on."""
        task = task_of(cell.settings)
        backbone = load_backbone(cell.settings.model, task)
        adapted: Any = cell.settings.method.load(backbone, task, self.run(cell.key) / "adapter")
        with whole(Path(base_folder(self, cell))) as unfinished:
            adapted.merge_and_unload().save_pretrained(unfinished)
            backbone.tokenizer.save_pretrained(unfinished)


def folder_of(grid: CompositionGrid, path: Path) -> CompositionFolder:
    """The folder of a study."""
    return CompositionFolder(path, grid.tests, grid.test_rows)


def run_stages(
    stages: Stages,
    folder: CompositionFolder,
    jobs: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
    starting: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """Run every cell that has no row yet, a stage only when the one before it is done.

    A cell that rests on one that failed fails too, and says so.

    Raises:
        LamellaError: a process of several died.
    """
    for cells in (stages.heads, stages.loras, stages.arms):
        if jobs > 1:
            work_in_processes(cells, folder, min(jobs, len(cells)), starting)
        else:
            work(cells, folder, callbacks, starting)


def read_answers(folder: CompositionFolder, cell: StagedCell) -> pd.DataFrame | None:
    """What a finished cell answered; None where it is not finished."""
    return pd.read_parquet(folder.answers(cell.key)) if folder.finished(cell.key) else None
