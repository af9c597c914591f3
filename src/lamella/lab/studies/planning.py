"""How long a study will take, before it starts and while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lamella.lab.data import load_backbone
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies.grid import Cell
from lamella.lab.studies.rows import StudyFolder

# a guess only until a cell has finished: what one CPU core does with matrices of a small transformer
_FLOPS = 3e10
_TOKENS_PER_WORD = 1.4


@dataclass(frozen=True)
class Plan:
    """Cells to run, those already done, and hours for what is left, with what the estimate rests on."""

    cells: int
    distinct: int
    done: int
    hours: float
    basis: str

    def __str__(self) -> str:
        shared = f" ({self.distinct} distinct)" if self.distinct < self.cells else ""
        return (
            f"{self.cells} cells{shared}, {self.done} done, {self.distinct - self.done} to run: "
            f"about {self.hours:.2f} h, {self.basis}."
        )


def plan(cells: Sequence[Cell], folder: StudyFolder, jobs: int = 1) -> Plan:
    """Hours for the cells without a row, from finished cells of the same method, else of any, else from tokens."""
    distinct = list({cell.key: cell for cell in cells}.values())
    rows = {cell.key: folder.row(cell.key) for cell in distinct}
    left = [cell for cell in distinct if rows[cell.key] is None]
    timed = [(cell, row["seconds"]) for cell in distinct if (row := rows[cell.key]) is not None]
    guesses: dict[tuple[str, str], float] = {}
    seconds, guessed = 0.0, 0
    for cell in left:
        known = _known(cell, timed)
        if known is None:
            guessed += 1
            place = (cell.backbone, cell.task)
            if place not in guesses:
                guesses[place] = _guess(cell.settings)
            known = guesses[place]
        seconds += known
    basis = f"with {jobs} process(es), "
    basis += f"{guessed} of them guessed from their tokens" if guessed else "by the time that finished cells took"
    return Plan(len(cells), len(distinct), len(distinct) - len(left), seconds / jobs / 3600, basis)


def _known(cell: Cell, timed: Iterable[tuple[Cell, float]]) -> float | None:
    same = [(other, taken) for other, taken in timed if (other.backbone, other.task) == (cell.backbone, cell.task)]
    own = [taken for other, taken in same if other.method == cell.method]
    return median(own or [taken for _, taken in same]) if same else None


def _guess(settings: RunSettings) -> float:
    """Forward and backward through a frozen backbone cost about 6 operations for each of its weights and each token."""
    task = task_of(settings)
    model = load_backbone(settings.model, task).model
    rows = {name: _tokens(split, settings.max_length) for name, split in task.splits.items()}
    steps = settings.max_steps
    rows_read = (settings.epochs or 1.0) * len(task.splits["train"])
    if steps is not None:
        rows_read = steps * settings.batch_size * settings.accumulation
    training = rows_read * rows["train"] / len(task.splits["train"])
    scoring = sum(count for name, count in rows.items() if name != "train")
    return float(_weights(model) * (6 * training + 2 * scoring) / _FLOPS)


def guess_scoring(settings: RunSettings, splits: Iterable[Iterable[Mapping[str, Any]]]) -> float:
    """Seconds to score these rows with a run's backbone: a guess, 2 operations for each weight and token."""
    tokens = sum(_tokens(split, settings.max_length) for split in splits)
    return float(_weights(load_backbone(settings.model).model) * 2 * tokens / _FLOPS)


def _weights(model: Any) -> int:
    embeddings = model.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - int(embeddings)


def _tokens(split: Iterable[Mapping[str, Any]], max_length: int) -> int:
    words = (sum(len(value.split()) for value in row.values() if isinstance(value, str)) for row in split)
    return sum(min(max_length, 2 + math.ceil(_TOKENS_PER_WORD * count)) for count in words)
