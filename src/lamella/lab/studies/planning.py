"""How long a study will take, before it starts and while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lamella.lab.data import load_backbone
from lamella.lab.data.task import METRICS
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies.cells import Asked, Cell, Job, jobs_of
from lamella.lab.studies.folder import StudyFolder
from lamella.lab.studies.search import Search

# a guess only until a cell has finished: what one CPU core does with matrices of a small transformer (MiniLM, 16 x 32
# tokens, an AMD EPYC: 8.7e10 forward and 8.3e10 through a frozen one and back, less what scoring and adapters add)
_FLOPS = 7e10
_TOKENS_PER_WORD = 1.4
_UNLIKE = 0.05


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


def plan(
    cells: Sequence[Cell], folder: StudyFolder, jobs: int = 1, guesses: dict[tuple[Any, ...], float] | None = None
) -> Plan:
    """Hours for what has no row yet, from finished jobs of the same method, else of any, else from tokens.

    Counting tokens reads every task: who plans again while cells finish gives the same ``guesses`` each time.
    """
    work = jobs_of(cells)
    rows = {job.key: folder.row(job.key) for job in work}
    todo = [job for job in work if rows[job.key] is None]
    seconds, guessed = _seconds(todo, work, rows, {} if guesses is None else guesses)
    basis = f"with {jobs} process(es), "
    basis += f"{guessed} of them guessed from their tokens" if guessed else "by the time that finished cells took"
    last = {cell.key: rows[cell.last] for cell in cells}
    done = sum(row is not None for row in last.values())
    return Plan(len(cells), len(last), done, seconds / jobs / 3600, basis)


def seconds_left(work: Sequence[Job], folder: StudyFolder, guesses: dict[tuple[Any, ...], float]) -> float:
    """What one process takes for the jobs that are neither done nor failed, as `plan` estimates it."""
    rows = {job.key: folder.row(job.key) for job in work}
    todo = [job for job in work if rows[job.key] is None and folder.failure(job.key) is None]
    return _seconds(todo, work, rows, guesses)[0]


def _seconds(
    todo: Sequence[Job],
    work: Sequence[Job],
    rows: Mapping[str, Mapping[str, Any] | None],
    guesses: dict[tuple[Any, ...], float],
) -> tuple[float, int]:
    """Of one process, and how many cells among these jobs are guessed, as nothing like them is done."""
    timed = [(job, row["seconds"]) for job in work if (row := rows[job.key]) is not None]
    seconds, guessed = 0.0, 0
    for job in todo:
        known = _known(job, timed)
        if known is None:
            guessed += not isinstance(job, Asked)
            kind = _kind(job)
            if kind not in guesses:
                guesses[kind] = _guess_answers(job) if isinstance(job, Asked) else _guess(_cell(job))
            known = guesses[kind] * (job.runs if isinstance(job, Search) else 1)
        seconds += known
    return seconds, guessed


def tellable(cells: Sequence[Cell]) -> dict[str, float]:
    """By what is tested and scored by accuracy, the smallest difference between two methods that a study is to find.

    With a power of .8 at .05, ``2.8 sqrt(d / n)`` of n test examples (Connor, Sample size for testing differences in
    proportions for the paired-sample design, Biometrics 1987), where d is the share of examples that the two answer
    unlike: .05, as methods of one size do in the project's studies. Seeds are not counted: they share the examples and
    differ themselves, and where they differ much, less is found. Before Holm's correction.
    """
    questions = next((cell.questions for cell in cells if cell.questions is not None), None)
    if questions is not None:
        tasks = questions.loaded()
    else:
        tasks = {name: task_of(settings) for name, settings in {cell.task: cell.settings for cell in cells}.items()}
    return {
        name: 2.8 * math.sqrt(_UNLIKE / len(task.splits["test"]))
        for name, task in tasks.items()
        if METRICS[task.kind] == "accuracy" and "test" in task.splits
    }


def _known(job: Job, timed: Iterable[tuple[Job, float]]) -> float | None:
    same = [(other, taken) for other, taken in timed if _kind(other) == _kind(job)]
    alike = [taken for other, taken in same if _cell(other).method == _cell(job).method]
    return median(alike or [taken for _, taken in same]) if same else None


def _kind(job: Job) -> tuple[Any, ...]:
    """What alike jobs have in common."""
    cell = _cell(job)
    if isinstance(job, Asked):
        return (cell.backbone, "masked" if job.masked else "answers")
    part = cell.part if cell.part == cell.settings.task else None  # stages of one sequence are alike
    return (cell.backbone, cell.task, part, *(["search"] if isinstance(job, Search) else []))


def _cell(job: Job) -> Cell:
    assert isinstance(job, Cell | Asked | Search)
    return job if isinstance(job, Cell) else job.cell


def _guess(cell: Cell) -> float:
    """Forward and backward through a frozen backbone cost about 6 operations for each of its weights and each token."""
    settings = cell.settings
    task = task_of(settings)
    # the plain backbone has the size of those with a head, which may not be made yet
    model = load_backbone(cell.backbone, task).model
    rows = {name: _tokens(split, settings.max_length) for name, split in task.splits.items()}
    steps = settings.max_steps
    rows_read = (settings.epochs or 1.0) * len(task.splits["train"])
    if steps is not None:
        rows_read = steps * settings.batch_size * settings.accumulation
    training = rows_read * rows["train"] / len(task.splits["train"])
    scoring = sum(count for name, count in rows.items() if name != "train")
    return float(_weights(model) * (6 * training + 2 * scoring) / _FLOPS)


def _guess_answers(job: Job) -> float:
    """2 operations for each weight and token; once for each LoRA that is left out."""
    cell = _cell(job)
    assert cell.questions is not None  # else there is nothing to answer
    splits = [task.splits["test"] for task in cell.questions.loaded().values()]
    tokens = sum(_tokens(split, cell.settings.max_length) for split in splits)
    times = len(getattr(cell.settings.method, "adapters", ())) if getattr(job, "masked", False) else 1
    return float(times * _weights(load_backbone(cell.backbone).model) * 2 * tokens / _FLOPS)


def _weights(model: Any) -> int:
    embeddings = model.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - int(embeddings)


def _tokens(split: Iterable[Mapping[str, Any]], max_length: int) -> int:
    words = (sum(len(value.split()) for value in row.values() if isinstance(value, str)) for row in split)
    return sum(min(max_length, 2 + math.ceil(_TOKENS_PER_WORD * count)) for count in words)
