"""What a study is made of: cells, which name what they need by key, and what their models are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from lamella.errors import LamellaError
from lamella.files import sha256_of
from lamella.lab.data.task import METRICS
from lamella.lab.runs.tasks import task_of
from lamella.lab.studies.answers import Questions, answers, masked_answers

if TYPE_CHECKING:
    from lamella.lab.runs.settings import RunSettings
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.search import Search

# what a cell's settings hold in place of a path, before the key of the cell that makes what lies there
LORA, BASE = "lora:", "head:"

# what earlier studies could not set leaves their cells' keys as they were
_LATER = {"start": None, "plain_text": None, "task_temperature": 1.0}


class Job(Protocol):
    """One piece of work: done once however often it is planned, and only after what it needs."""

    @property
    def key(self) -> str:
        """Names the work and all that it rests on, wherever that lies."""

    @property
    def label(self) -> str:
        """For people."""

    @property
    def needs(self) -> Sequence[str]:
        """Keys of the jobs that must be done before."""

    def carry_out(self, folder: StudyFolder) -> dict[str, Any]:
        """Do it; what its row says besides the time it took."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        backbone: as tables name it.
        task: as tables name it.
        method: by its name in the recipe.
        settings: of the run; ``lora:KEY`` and ``head:KEY`` stand for what other cells make.
        questions: what its model answers when it is trained; None where the run's scores are all that counts.
        masked: whether its model answers without each of its LoRAs too.
        makes_base: whether its model becomes a backbone that other cells train on.
        compared_with: keys of the cells whose LoRAs its answers are compared with at once, by source.
        search: the job that chooses the settings which these ones leave open.
        part: of a run on one of several tasks alone, which one.
        run: which of a study's runs of that method the cell is a stage of.
    """

    backbone: str
    task: str
    method: str
    settings: RunSettings
    questions: Questions | None = None
    masked: bool = False
    makes_base: bool = False
    compared_with: Mapping[str, str] = field(default_factory=dict)
    search: Search | None = None
    part: str | None = None
    run: int = 0

    @property
    def seed(self) -> int:
        """The seed, which also orders the training rows: the same for every method."""
        return self.settings.seed

    @cached_property
    def key(self) -> str:
        """Names the settings, whatever the method is called: 16 hexadecimal digits of their SHA-256."""
        key = key_of(self.settings, self.questions)
        return key if self.search is None else hashlib.sha256(f"{key} {self.search.key}".encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For people."""
        run = f", run {self.run}" if self.run else ""
        return f"{self.method} on {self.part or self.task} with {self.backbone}, seed {self.seed}{run}"

    @cached_property
    def needs(self) -> Sequence[str]:
        """Keys of the cells whose LoRAs and backbones it is made from, and of its search."""
        made_from = [text for text in _texts(_needing(self.settings)) if text.startswith((LORA, BASE))]
        return [text.partition(":")[2] for text in made_from] + ([self.search.key] if self.search else [])

    @property
    def last(self) -> str:
        """The key of the job after which the cell has all that tables need."""
        return self.key if self.questions is None else Asked(self).key

    def check(self) -> None:
        """Raise a LamellaError where tables put its task beside others by accuracy, and it is scored otherwise."""
        if self.part is None:
            return
        task = task_of(self.settings)
        if METRICS[task.kind] != "accuracy":  # classes have it, whatever metric a benchmark prefers
            raise LamellaError(
                f"Runs on each of several tasks are put together by accuracy, and {task.name} is a {task.kind} task, "
                "which has none. Compare methods on it in a study of its own."
            )

    def carry_out(self, folder: StudyFolder) -> dict[str, Any]:
        """Train to the end, from the last checkpoint where there is one, and examine what came out."""
        self.check()
        return folder.train(self)


@dataclass(frozen=True)
class Asked:
    """What the model of a cell answers; with ``masked``, without each of its LoRAs in turn."""

    cell: Cell
    masked: bool = False

    @property
    def key(self) -> str:
        """The cell's key and what is asked."""
        return f"{self.cell.key}-{'masked' if self.masked else 'answers'}"

    @property
    def label(self) -> str:
        """For people."""
        return f"answers of {self.cell.label}{', a LoRA left out' * self.masked}"

    @property
    def needs(self) -> Sequence[str]:
        """The cell, and the LoRAs that its answers are compared with."""
        return [self.cell.key, *(() if self.masked else self.cell.compared_with.values())]

    def carry_out(self, folder: StudyFolder) -> dict[str, Any]:
        """Let the trained model answer every test."""
        settings, run = folder.placed(folder.chosen(self.cell)), folder.run(self.cell.key)
        assert self.cell.questions is not None  # else there is nothing to ask
        if self.masked:
            path, table = folder.masked(self.cell.key), masked_answers(settings, run, self.cell.questions)
        else:
            loras = {source: str(folder.run(key)) for source, key in self.cell.compared_with.items()}
            path, table = folder.answers(self.cell.key), answers(settings, run, self.cell.questions, loras)
        folder.write_table(path, table)
        return {"sha256": sha256_of(path)}


def jobs_of(cells: Iterable[Cell]) -> list[Job]:
    """All the work of these cells, each once, in an order in which it can be done."""
    jobs: dict[str, Job] = {}
    for cell in cells:
        if cell.search is not None:
            jobs.setdefault(cell.search.key, cell.search)
        jobs.setdefault(cell.key, cell)
        if cell.questions is not None:
            jobs.setdefault(Asked(cell).key, Asked(cell))
        if cell.masked:
            jobs.setdefault(Asked(cell, masked=True).key, Asked(cell, masked=True))
    return list(jobs.values())


def key_of(settings: RunSettings, questions: Questions | None) -> str:
    """Names a run by its settings, and by what its model is asked."""
    run: Any = settings.model_dump(mode="json")
    for later, default in _LATER.items():
        if run[later] == default:
            del run[later]
    identity = run if questions is None else {"run": run, "tests": questions.tasks, "test_rows": questions.rows}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _needing(settings: RunSettings) -> Any:
    return [settings.model, settings.start or "", getattr(settings.method, "adapters", {})]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
