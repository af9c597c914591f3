"""A study on disk: a row per finished job, a lock per running one, and never two processes on the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lamella.errors import LamellaError
from lamella.files import atomic, claimed, read_json, read_table, write_atomic
from lamella.lab.data import load_backbone
from lamella.lab.methods import read_saved
from lamella.lab.runs.checks import diagnose
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import RunResult, train
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies.cells import BASE, LORA, Asked, Cell, Job, jobs_of, key_of
from lamella.lab.studies.search import with_values

_PLACES = {LORA: "runs", BASE: "bases"}
_PLACE = re.compile(r"(?:.*/)?(runs|bases)/([0-9a-f]{16})")


@dataclass(frozen=True)
class StudyFolder:
    """``rows/KEY.json`` of every finished job and why others failed; ``runs/KEY`` of every begun cell.

    Beside them ``bases/KEY``, a backbone with the head that a cell trained, ``answers/KEY.parquet``,
    ``masked/KEY.parquet`` and, of a search, ``tries/KEY``. ``keys.json`` says under which key lies what an earlier
    edition called otherwise.
    """

    path: Path

    def run(self, key: str) -> Path:
        """The folder of a cell's run."""
        return self.path / "runs" / self._lying(key)

    def base(self, key: str) -> Path:
        """The backbone with a cell's head, as one model."""
        return self.path / "bases" / self._lying(key)

    def answers(self, key: str) -> Path:
        """What a cell's model answered: test, row and what it said."""
        return self.path / "answers" / f"{self._lying(key)}.parquet"

    def masked(self, key: str) -> Path:
        """What it answered without each of its LoRAs: dropped, and the same."""
        return self.path / "masked" / f"{self._lying(key)}.parquet"

    def tries(self, key: str) -> Path:
        """What a search has tried."""
        return self.path / "tries" / key

    def chosen(self, cell: Cell) -> RunSettings:
        """A cell's settings, with what its search has chosen."""
        row = None if cell.search is None else self.row(cell.search.key)
        return cell.settings if row is None else with_values(cell.settings, row["chosen"])

    def row(self, key: str) -> dict[str, Any] | None:
        """What a finished job measured; None if it is not finished."""
        return read_json(self.row_path(key)) if self.finished(key) else None

    def finished(self, key: str) -> bool:
        """Whether the job has its row."""
        return self.row_path(key).is_file()

    def failure(self, key: str) -> str | None:
        """Why the job could not be done, in this study's last attempt."""
        path = self._failure(key)
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def begin(self, cells: Sequence[Cell], *, force: bool = False) -> None:
        """Forget earlier failures and, with ``force``, everything about these cells that nobody is working on."""
        for job in jobs_of(cells):
            with self.claim(job.key) as claimed:
                if claimed:
                    self._failure(job.key).unlink(missing_ok=True)
                if claimed and force:
                    self.row_path(job.key).unlink(missing_ok=True)
                    self.answers(job.key).unlink(missing_ok=True)
                    self.masked(job.key).unlink(missing_ok=True)
                    shutil.rmtree(self.run(job.key), ignore_errors=True)
                    shutil.rmtree(self.tries(job.key), ignore_errors=True)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process alone may do the job; the kernel gives the lock back however the process ends."""
        path = self.path / "locks" / key
        with claimed(path) as mine:
            if mine:
                path.write_text(str(os.getpid()), encoding="utf-8")
            yield mine

    def claimant(self, key: str) -> int | None:
        """The process that claimed the job last, alive or not."""
        path = self.path / "locks" / key
        said = path.read_text(encoding="utf-8") if path.is_file() else ""
        return int(said) if said.isdigit() else None

    def carry_out(self, job: Job) -> None:
        """Do a claimed job to its end, and write its row."""
        started = time.perf_counter()
        row = job.carry_out(self)
        # of a run that was interrupted the earlier part counts too
        seconds = max(time.perf_counter() - started, row.get("metrics", {}).get("train_seconds", 0.0))
        write_atomic(self.row_path(job.key), json.dumps({"seconds": seconds, **row}))

    def train(self, cell: Cell) -> dict[str, Any]:
        """Run a cell, from its last checkpoint where there is one, and let the doctor examine it."""
        run, settings = RunFolder(self.run(cell.key)), self.placed(self.chosen(cell))
        if run.finished:  # killed between the end of the run and its row, there is nothing left to train
            run.remove_checkpoints()
        trained = RunResult(run, run.metrics()) if run.finished else train(settings, run.path)
        metrics = trained.metrics
        if cell.makes_base:
            self._keep_base(cell)
        row = {"settings": settings.written(), "metrics": metrics}
        # what was not trained has nothing to examine, and what does not resume cannot be loaded as doctors do
        if metrics["steps"] and settings.method.resumes:
            row["diagnosis"] = diagnose(trained).as_dict()
        return row

    def fail(self, job: Job, reason: str) -> None:
        """Keep why a job cannot be done, so that nobody tries it again in this attempt."""
        write_atomic(self._failure(job.key), reason)

    def placed(self, settings: RunSettings) -> RunSettings:
        """Settings with the paths of what other cells made in place of their keys."""
        method = settings.method
        if adapters := getattr(method, "adapters", {}):
            method = method.model_copy(update={"adapters": {name: self._place(one) for name, one in adapters.items()}})
        start = None if settings.start is None else self._place(settings.start)
        return settings.model_copy(update={"model": self._place(settings.model), "start": start, "method": method})

    def write_table(self, path: Path, table: pd.DataFrame) -> None:
        """Write a Parquet file, all of it or nothing."""
        with atomic(path) as unfinished:
            table.to_parquet(unfinished, index=False)

    def adopt(self, cells: Sequence[Cell]) -> list[str]:
        """Recognise by their settings what an earlier edition finished under other keys; labels of these cells.

        Nothing is moved: ``keys.json`` then says where such a cell lies.
        """
        keys, adopted = self._keys(), []
        files = {path.stem: path for path in (self.path / "rows").glob("*.json")}
        wanted = {cell.key: cell for cell in cells if cell.key not in keys and cell.key not in files}
        old = {stem: path for stem, path in files.items() if "-" not in stem and stem not in keys.values()}
        renamed = {stem: stem for stem in files} | {lying: key for key, lying in keys.items()}
        recognised = True
        while wanted and recognised:
            recognised = False
            for stem in [stem for stem in old if renamed[stem] == stem]:
                settings = _saved_settings(read_json(old[stem]).get("settings", {}), renamed)
                key = key_of(settings, next(iter(wanted.values())).questions) if wanted else ""
                if key in wanted:
                    adopted.append(wanted.pop(key).label)
                    keys[key], renamed[stem], recognised = stem, key, True
        if adopted:
            write_atomic(self.path / "keys.json", json.dumps(keys, indent=2))
        self._adopt_answers(cells)
        return adopted

    def saved_settings(self, row: Mapping[str, Any]) -> RunSettings:
        """The settings in a row, with keys in place of paths into this folder.

        Raises:
            LamellaError: it has none, or they do not fit.
        """
        if not isinstance(settings := row.get("settings"), Mapping):
            raise LamellaError("it has no settings")
        return _saved_settings(settings, {lying: key for key, lying in self._keys().items()})

    def _adopt_answers(self, cells: Sequence[Cell]) -> None:
        """The first edition wrote no row of what was asked; its time is in that of the run."""
        for job in jobs_of(cells):
            if isinstance(job, Asked) and self.finished(job.cell.key) and not self.finished(job.key):
                path = self.masked(job.cell.key) if job.masked else self.answers(job.cell.key)
                if path.is_file() and "metrics" in (self.row(job.cell.key) or {}):
                    write_atomic(self.row_path(job.key), json.dumps({"seconds": 0.0}))

    def _keep_base(self, cell: Cell) -> None:
        """The backbone with a trained head as one model, which other cells of that seed are trained on."""
        task = task_of(cell.settings)
        backbone = load_backbone(cell.settings.model, task)
        adapted: Any = cell.settings.method.load(backbone, task, self.run(cell.key) / "adapter")
        with atomic(self.base(cell.key)) as unfinished:
            adapted.merge_and_unload().save_pretrained(unfinished)
            backbone.tokenizer.save_pretrained(unfinished)

    def _place(self, text: str) -> str:
        kind, colon, key = text.partition(":")
        folder = _PLACES.get(f"{kind}{colon}")
        return text if folder is None else str(self.path / folder / self._lying(key))

    def _keys(self) -> dict[str, str]:
        path = self.path / "keys.json"
        return read_json(path) if path.is_file() else {}

    def _lying(self, key: str) -> str:
        return self._keys().get(key, key)

    def row_path(self, key: str) -> Path:
        """Where the row of a job lies."""
        cell, dash, asked = key.partition("-")
        return self.path / "rows" / f"{self._lying(cell)}{dash}{asked}.json"

    def _failure(self, key: str) -> Path:
        return self.path / "failed" / f"{key}.txt"


def _saved_settings(values: Mapping[str, Any], renamed: Mapping[str, str]) -> RunSettings:
    """The settings of a row, with keys in place of paths into the study's folder."""

    def keyed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: keyed(one) for name, one in value.items()}
        if isinstance(value, str) and (match := _PLACE.fullmatch(value)):
            prefix = LORA if match[1] == "runs" else BASE
            return f"{prefix}{renamed.get(match[2], match[2])}"
        return value

    return RunSettings.parse(read_saved(keyed(values)))


def answered(folder: StudyFolder, cell: Cell) -> pd.DataFrame | None:
    """What a cell's model answered; None where it has not."""
    asked = Asked(cell)
    return read_table(folder.answers(cell.key), "test", "row") if folder.finished(asked.key) else None


def answered_masked(folder: StudyFolder, cell: Cell) -> pd.DataFrame | None:
    """What it answered without each of its LoRAs; None where it was not asked or has not answered."""
    done = cell.masked and folder.finished(Asked(cell, masked=True).key)
    return read_table(folder.masked(cell.key), "test", "row", "dropped") if done else None
