"""A study of composition on disk: its runs, the backbone with each head, and what everything answers on every test."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from lamella.diagnostics.doctor import doctor
from lamella.files import whole, write_whole
from lamella.lab.data import load_backbone
from lamella.lab.methods import Composition
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import train
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies.composition.answers import Questions, answers, masked_answers
from lamella.lab.studies.composition.grid import CompositionGrid, StagedCell, Stages, base_folder
from lamella.lab.studies.grid import Cell
from lamella.lab.studies.rows import StudyFolder
from lamella.lab.studies.workers import work, work_in_processes


@dataclass(frozen=True)
class CompositionFolder(StudyFolder):
    """A study's folder; beside its runs, ``bases/KEY`` of every head and ``answers/KEY.parquet`` of every cell.

    Attributes:
        tests: what every cell answers.
    """

    tests: Questions

    def answers(self, key: str) -> Path:
        """What a cell's model answered: test, row and what it said."""
        return self.path / "answers" / f"{key}.parquet"

    def masked(self, key: str) -> Path:
        """What it answered without each of its LoRAs: dropped, and the same."""
        return self.path / "masked" / f"{key}.parquet"

    def train(self, cell: Cell, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Run a claimed cell to its end, let its model answer every test, and write its row."""
        assert isinstance(cell, StagedCell)
        started = time.perf_counter()
        run = RunFolder(self.run(cell.key))
        metrics = run.metrics() if run.finished else train(cell.settings, run.path, callbacks=callbacks).metrics
        if cell.settings.method.name == "head":
            self._keep_base(cell)
        if self.tests.compares and not isinstance(cell.settings.method, Composition):
            # answers are compared with those of the LoRAs alone, which are yet to be trained; earlier ones are stale
            self.answers(cell.key).unlink(missing_ok=True)
        else:
            self.answer(cell)
        seconds = max(time.perf_counter() - started, metrics["train_seconds"])
        row = {"settings": cell.settings.model_dump(mode="json"), "seconds": seconds, "metrics": metrics}
        # what was not trained has nothing to examine, and PEFT's X-LoRA cannot be loaded as doctors do
        if metrics["steps"] and cell.settings.method.resumes:
            row["diagnosis"] = doctor(run.path).as_dict()
        write_whole(self._row(cell.key), json.dumps(row))

    def answered(self, key: str) -> bool:
        """Whether the cell is finished and has answered."""
        return self.finished(key) and self.answers(key).is_file()

    def answer(self, cell: StagedCell) -> None:
        """Let a trained cell's model answer every test, without each of its LoRAs too where the recipe asks for it."""
        run = self.run(cell.key)
        if cell.masked:
            with whole(self.masked(cell.key)) as unfinished:
                masked_answers(cell.settings, run, self.tests).to_parquet(unfinished, index=False)
        found = answers(cell.settings, run, self.tests, cell.loras)
        with whole(self.answers(cell.key)) as unfinished:
            found.to_parquet(unfinished, index=False)

    def _keep_base(self, cell: Cell) -> None:
        """The backbone with a trained head as one model, which the LoRAs of that seed are trained on."""
        task = task_of(cell.settings)
        backbone = load_backbone(cell.settings.model, task)
        adapted: Any = cell.settings.method.load(backbone, task, self.run(cell.key) / "adapter")
        with whole(Path(base_folder(self, cell))) as unfinished:
            adapted.merge_and_unload().save_pretrained(unfinished)
            backbone.tokenizer.save_pretrained(unfinished)


@dataclass(frozen=True)
class AnswersFolder(CompositionFolder):
    """The same folder to those who answer for cells that were trained before they could: its work is answers alone."""

    def finished(self, key: str) -> bool:
        """Whether the cell has answered."""
        return self.answers(key).is_file()

    def train(self, cell: Cell, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Let a claimed cell's model answer."""
        assert isinstance(cell, StagedCell)
        self.answer(cell)


def folder_of(grid: CompositionGrid, path: Path) -> CompositionFolder:
    """The folder of a study."""
    return CompositionFolder(path, Questions(grid.tests, grid.test_rows, grid.answers))


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

    def run(cells: Sequence[StagedCell], place: CompositionFolder) -> None:
        if jobs > 1:
            work_in_processes(cells, place, min(jobs, len(cells)), starting)
        else:
            work(cells, place, callbacks, starting)

    run(stages.heads, folder)
    run(stages.loras, folder)
    if folder.tests.compares:
        run([*stages.heads, *stages.loras], AnswersFolder(folder.path, folder.tests))
    run(stages.arms, folder)


def read_answers(folder: CompositionFolder, cell: StagedCell) -> pd.DataFrame | None:
    """What a cell answered; None where it has not."""
    return pd.read_parquet(folder.answers(cell.key)) if folder.answered(cell.key) else None


def read_masked(folder: CompositionFolder, cell: StagedCell) -> pd.DataFrame | None:
    """What it answered without each of its LoRAs; None where it was not asked or has not answered."""
    return pd.read_parquet(folder.masked(cell.key)) if cell.masked and folder.answered(cell.key) else None
