"""A study on disk: a row per finished cell, a lock per running one, and never two processes on the same cell."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lamella.diagnostics.doctor import doctor
from lamella.files import write_whole
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.run import train
from lamella.lab.studies.grid import Cell


@dataclass(frozen=True)
class StudyFolder:
    """``rows/KEY.json`` of every finished cell, ``runs/KEY`` of every begun one, and why a cell failed."""

    path: Path

    def run(self, key: str) -> Path:
        """The folder of a cell's run."""
        return self.path / "runs" / key

    def row(self, key: str) -> dict[str, Any] | None:
        """What a finished cell measured; None if it is not finished."""
        try:
            found: dict[str, Any] = json.loads(self._row(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def finished(self, key: str) -> bool:
        """Whether the cell has its row."""
        return self._row(key).is_file()

    def failure(self, key: str) -> str | None:
        """Why the cell could not be run, in this study's last attempt."""
        path = self._failure(key)
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def begin(self, cells: Sequence[Cell], *, force: bool = False) -> None:
        """Forget earlier failures and, with ``force``, everything about these cells that nobody is running."""
        for key in {cell.key for cell in cells}:
            with self.claim(key) as claimed:
                if claimed:
                    self._failure(key).unlink(missing_ok=True)
                if claimed and force:
                    self._row(key).unlink(missing_ok=True)
                    shutil.rmtree(self.run(key), ignore_errors=True)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process alone may run the cell; the kernel gives the lock back however the process ends."""
        path = self.path / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def train(self, cell: Cell, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Run a claimed cell to its end, from its last checkpoint where there is one, examine it, and write its row."""
        started = time.perf_counter()
        run = RunFolder(self.run(cell.key))
        # killed between the end of the run and its row, there is nothing left to train
        metrics = run.metrics() if run.finished else train(cell.settings, run.path, callbacks=callbacks).metrics
        seconds = max(time.perf_counter() - started, metrics["train_seconds"])
        row = {
            "settings": cell.settings.model_dump(mode="json"),
            "seconds": seconds,
            "metrics": metrics,
            "diagnosis": doctor(run.path).as_dict(),
        }
        write_whole(self._row(cell.key), json.dumps(row))

    def fail(self, cell: Cell, reason: str) -> None:
        """Keep why a cell cannot be run, so that no other worker tries it in this attempt."""
        write_whole(self._failure(cell.key), reason)

    def _row(self, key: str) -> Path:
        return self.path / "rows" / f"{key}.json"

    def _failure(self, key: str) -> Path:
        return self.path / "failed" / f"{key}.txt"
