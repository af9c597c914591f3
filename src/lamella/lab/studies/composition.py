"""Studies of composition: a head, a LoRA per source and one for all, then every way to put the LoRAs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lamella.errors import LamellaError
from lamella.lab.methods import ComposingMethod
from lamella.lab.studies.answers import Answers, Questions, TestRows
from lamella.lab.studies.cells import BASE, LORA, Cell
from lamella.lab.studies.composition_results import KL, MIXTURE, measured
from lamella.lab.studies.recipe import (
    Measured,
    StudyRecipe,
    TableOf,
    check_name,
    method_settings,
    refuse_without_method,
)
from lamella.lab.studies.search import Searched, check_search, search_note, search_of

if TYPE_CHECKING:
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.results import Results

HEAD, JOINT = "no LoRA", "joint LoRA"
METRIC = {"classes": "accuracy", "options": "accuracy", "tokens": "loss"}


class CompositionStudy(StudyRecipe):
    """LoRAs trained apart, put together in many ways, and asked what each of them still knows.

    Where classes are asked for, a head is trained once per seed, with the backbone frozen, on the training rows of all
    sources, and is frozen from then on: all LoRAs and methods share it, and differ in their deltas alone. A language
    model, which is asked for options or tokens, needs no head.
    """

    backbone: str = Field(description="a demo asset, a hub id or a path of the model")
    answers: Answers = Field(
        "classes",
        description="what tests ask for: the class of a text, the likeliest of a task's answers, or a text's tokens, "
        "scored by their loss",
    )
    sources: dict[str, str] = Field(min_length=2, description="the task that each LoRA learns, by a name for it")
    held_out: dict[str, str] = Field(description="tasks that no LoRA learns, by a name for them")
    lora: dict[str, Any] = Field(
        description="settings of LoRA, and of the runs that train the sources' and the joint one"
    )
    head: dict[str, Any] = Field(default_factory=dict, description="settings of the run that trains the head")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="by the name that tables show: 'method', 'sources' if it composes not all, and settings of its run",
    )
    masked: list[str] = Field(
        default_factory=list, description="methods that answer again without each of their LoRAs in turn: mole, uniform"
    )
    fitted_on: str | None = Field(
        None,
        description="the held-out task whose training rows methods are fitted on; else the sources' validation rows",
    )
    search: Searched | None = Field(
        None, description="settings that are chosen for each method that has them, with the LoRAs of the first seed"
    )
    rows: int = Field(256, gt=0, description="that methods are fitted on, unseen by LoRAs")
    test_rows: TestRows = Field(None, description="of each source and held-out task, or by their names; all if absent")

    @property
    def metric(self) -> str:
        """What tests are scored by."""
        return METRIC[self.answers]

    @property
    def union(self) -> str:
        """The task of all sources together."""
        return f"mix:{'+'.join(self.sources.values())}"

    @property
    def fitting(self) -> str:
        """The task that methods are fitted on."""
        return f"held:{self.union}" if self.fitted_on is None else self.held_out[self.fitted_on]

    @property
    def names(self) -> list[str]:
        return [*self.methods, *map(alone, self.sources), JOINT, HEAD]

    @property
    def listed(self) -> list[str]:
        return list(self.methods)

    @property
    def tests(self) -> dict[str, str]:
        """The tasks that everything is scored on."""
        return {**self.sources, **self.held_out}

    @property
    def questions(self) -> Questions:
        """What every model is asked."""
        return Questions(self.tests, self.test_rows, self.answers)

    @property
    def tables(self) -> list[TableOf]:
        """The mixture, every held-out test and every source; then what is kept on the mixture, as a KL."""
        return [
            *(TableOf(self.backbone, test, self.metric, test) for test in (MIXTURE, *self.held_out)),
            *(TableOf(self.backbone, test, self.metric, test, part=True) for test in self.sources),
            TableOf(self.backbone, MIXTURE, KL, f"{MIXTURE}, what is kept"),
        ]

    def check(self) -> None:
        check_name(self.reference_name, self.methods, "method for 'reference'")
        if self.fitted_on is not None:
            check_name(self.fitted_on, self.held_out, "held-out task for 'fitted_on'")
        if isinstance(self.test_rows, dict) and self.test_rows.keys() != self.tests.keys():
            raise LamellaError(f"test_rows by name must name every source and held-out task: {', '.join(self.tests)}.")
        refuse_without_method(self.methods, "uniform")
        self._check_settings()
        if len({*self.names, *self.tests}) < len(self.names) + len(self.sources) + len(self.held_out):
            raise LamellaError(
                "Methods, sources and held-out tasks need different names, other than those of the LoRAs alone."
            )
        self._check_masked()
        if self.search is not None:
            composed = [cell for cell in self._of_seed(self.seed_list[0]) if cell.method in self.methods]
            check_search(self.search, self.seed_list, composed, self.run, self.methods)

    def _check_settings(self) -> None:
        places = {"run.": self.run, "lora.": self.lora, "head.": self.head}
        places |= {f"methods.{name}.": given for name, given in self.methods.items()}
        for place, given in places.items():
            if fixed := [key for key in ("model", "task", "seed") if key in given]:
                raise LamellaError(
                    f"{place}{fixed[0]} follows from the study's backbone, sources and seeds. Leave it out."
                )
        for name, given in self.methods.items():
            chosen = given.get("sources", list(self.sources))
            if not isinstance(chosen, list) or not chosen:
                raise LamellaError(
                    f"methods.{name}.sources={chosen} must be a list of the study's sources, for example [a]."
                )
            for source in chosen:
                check_name(str(source), self.sources, "source")

    def _check_masked(self) -> None:
        for name in self.masked:
            check_name(name, self.methods, "method for 'masked'")
        for cell in self.cells() if self.masked else ():
            method = cell.settings.method
            if cell.masked and not (
                isinstance(method, ComposingMethod) and method.masked_by and len(method.adapters) > 1
            ):
                raise LamellaError(
                    f"masked names the method {cell.method}, but LoRAs can be left out only of one that composes at "
                    "least two, by mole or without training, such as uniform."
                )

    def cells(self) -> list[Cell]:
        by_seed = [self._of_seed(seed) for seed in self.seed_list]
        return [self._searched(cell, first) for cells in by_seed for cell, first in zip(cells, by_seed[0], strict=True)]

    def _searched(self, cell: Cell, first: Cell) -> Cell:
        """The cell with the search for the same method's settings on the first seed's head and LoRAs."""
        if self.search is None or cell.method not in self.methods:
            return cell
        return replace(cell, search=search_of(first, self.search))

    def _of_seed(self, seed: int) -> list[Cell]:
        """The head, a LoRA per source and the joint one, then the methods."""
        classes = self.answers == "classes"
        head = self._cell(HEAD, self.union, seed, self.backbone, {"method": "head" if classes else "bare", **self.head})
        model = f"{BASE}{head.key}" if classes else self.backbone
        lora = {**self.lora, "method": {"name": "lora-only", **self.lora.get("method", {})}}
        loras = {name: self._cell(alone(name), task, seed, model, lora) for name, task in self.sources.items()}
        joint = self._cell(JOINT, self.union, seed, model, lora)
        adapters = {name: f"{LORA}{cell.key}" for name, cell in loras.items()}
        composed = [self._composed(name, seed, model, adapters) for name in self.methods]
        cells = [head, *loras.values(), joint, *composed]
        if not self.questions.compares:
            return cells
        keys = {name: cell.key for name, cell in loras.items()}
        return [replace(cell, compared_with=keys) for cell in cells]

    def _composed(self, name: str, seed: int, model: str, adapters: Mapping[str, str]) -> Cell:
        given = dict(self.methods[name])
        chosen, method = given.pop("sources", self.sources), given.pop("method")
        method = {"name": method} if isinstance(method, str) else method
        composed = {**method, "adapters": {source: adapters[source] for source in chosen}}
        return self._cell(name, self.fitting, seed, model, {"limit": {"train": self.rows}, **given, "method": composed})

    def _cell(self, name: str, task: str, seed: int, model: str, given: Mapping[str, Any]) -> Cell:
        settings = method_settings({**self.run, **given, "model": model, "task": task, "seed": seed})
        makes_base = name == HEAD and self.answers == "classes"
        return Cell(self.backbone, task, name, settings, self.questions, name in self.masked, makes_base)

    def measured(self, cells: Sequence[Cell], folder: StudyFolder) -> Measured:
        loras = {alone(source): source for source in self.sources}
        union = self.union if self.answers == "classes" else None
        return measured(self.questions, self.metric, loras, union, cells, folder)

    def notes(self, cells: Sequence[Cell], folder: StudyFolder, results: Sequence[Results]) -> list[str]:
        head = (
            "The task head is trained once per seed on the training rows of all sources, the backbone frozen, and is "
            f"frozen in every LoRA and method; '{HEAD}' is that model."
        )
        compared = "mean KL(LoRA || method) in nats, 0 for the same."
        if self.answers == "tokens":
            head = (
                f"'{HEAD}' is the backbone as it is. Loss is in nats per token: the mean over texts of a text's mean."
            )
            compared = f"over the whole vocabulary at every token; {compared}"
        if self.answers == "options":
            head = (
                f"'{HEAD}' is the backbone as it is. A question is answered by the likeliest of its task's answers, "
                "by the sum of the log-probabilities of an answer's tokens, without the end token. The floors are "
                "chance and the commonest answer of the tested rows."
            )
        fitted = (
            f"{self.rows} validation rows of the sources, which no LoRA was trained on"
            if self.fitted_on is None
            else f"{self.rows} examples of {self.fitted_on}, the same for every seed; no LoRA was trained on that task"
        )
        chosen = None if self.search is None else search_note(self.search, cells, folder)
        return [
            f"{head} Methods are fitted on {fitted}.",
            *([] if chosen is None else [f"With the LoRAs of the first seed, {chosen}"]),
            f"'{JOINT}' is one LoRA trained on all sources' training rows: an upper reference, not a composition.",
            "The mixture is the test rows of all sources. 'kl from own LoRA' compares, on every source's test rows, "
            f"the probabilities of a method with those of that source's LoRA alone: {compared}",
            "The tables are of the mixture and of what no LoRA was trained on; each source's test is in "
            "results.parquet.",
        ]


def alone(source: str) -> str:
    """What tables call a source's LoRA by itself."""
    return f"{source} LoRA"
