"""Studies of learning several tasks one after the other: what each method keeps of the earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from lamella.errors import LamellaError, UnreadableError
from lamella.files import read_table
from lamella.lab.methods import ComposingMethod, Method, method_from
from lamella.lab.methods.base import method_values, registered
from lamella.lab.runs.plain_text import RISE
from lamella.lab.runs.settings import RunSettings, changed, joint_name
from lamella.lab.schema import unknown_key
from lamella.lab.studies.cells import LORA, Cell
from lamella.lab.studies.forgetting import MEASURES, example_scores
from lamella.lab.studies.places import by_place, scores_by_task, united_costs
from lamella.lab.studies.recipe import (
    Measured,
    StudyRecipe,
    TableOf,
    check_name,
    method_settings,
    refuse_without_method,
)
from lamella.lab.studies.results import COSTS, Floats, examples_frame, results_frame
from lamella.lab.studies.search import Searched, search_of, shown

if TYPE_CHECKING:
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.results import Results

_OWN = ("method", "rehearsed", "loras")
STAGES = "stages"


class Continual(StudyRecipe):
    """Tasks learned one after the other, by every method, in several orders.

    A stage goes on from the adapter of the one before, and is tested on all tasks. All tasks have their heads from the
    start, and a stage trains its own task's alone: what is forgotten is forgotten by the adapter. A method over LoRAs
    has one for each task, trained from the base, and puts those of the tasks so far together at every stage.
    """

    backbone: str = Field(description="a demo asset, a hub id or a path of the model")
    sequence: list[str] = Field(min_length=2, description="the tasks, in the order that runs with every seed")
    orders: list[list[str]] = Field(default_factory=list, description="further orders, each with the first seed")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="by the name that tables show: 'method', any setting of its runs, 'rehearsed', the training rows "
        "of each earlier task that a stage learns again, and of a method over LoRAs 'loras', the method of these",
    )
    search: Searched | None = Field(
        None, description="settings that are chosen for each method by learning all tasks at once, on validation rows"
    )

    @property
    def runs(self) -> list[tuple[tuple[str, ...], int]]:
        """Order and seed of each run; tables call a run by its number."""
        first = super().seed_list
        return [
            *((tuple(self.sequence), seed) for seed in first),
            *((tuple(order), first[0]) for order in self.orders),
        ]

    @property
    def seed_list(self) -> list[int]:
        return list(range(len(self.runs)))

    @property
    def title(self) -> str:
        """What tables call the tasks."""
        return " > ".join(self.sequence)

    @property
    def names(self) -> list[str]:
        return list(self.methods)

    @property
    def listed(self) -> list[str]:
        return self.names

    @property
    def tables(self) -> list[TableOf]:
        names = [*(measure.name for measure in MEASURES), *[RISE] * ("plain_text" in self.run)]
        return [TableOf(self.backbone, self.title, name, name) for name in names]

    def check(self) -> None:
        if self.reference is not None:
            check_name(self.reference, self.methods, "method for 'reference'")
        joint_name(self.sequence, "sequence")
        for order in self.orders:
            if sorted(order) != sorted(self.sequence):
                raise LamellaError(f"orders has {order}, which are not the tasks of the sequence in another order.")
        known = [key for key in RunSettings.model_fields if key not in ("model", "task", "seed", "start")]
        refuse_without_method(self.methods, "lora")
        for name, given in self.methods.items():
            if unknown := [key for key in given if key not in (*known, *_OWN)]:
                raise LamellaError(unknown_key(unknown[0], [*known, *_OWN], f"methods.{name}."))
            _check_composing(name, given)
        if unknown := [key for key in self.run if key not in known or key == "method"]:
            raise LamellaError(unknown_key(unknown[0], [key for key in known if key != "method"], "run."))
        for name in self.methods:
            _stages(self, name, tuple(self.sequence), seed=0, run=0)  # refuses settings that do not fit

    def cells(self) -> list[Cell]:
        return [
            cell
            for run, (order, seed) in enumerate(self.runs)
            for name in self.methods
            for cell in _stages(self, name, order, seed, run)
        ]

    def measured(self, cells: Sequence[Cell], folder: StudyFolder) -> Measured:
        rows: list[dict[str, Any]] = []
        examples: list[dict[str, Any]] = []
        stages: list[dict[str, Any]] = []
        for place in by_place([cell for cell in cells if cell.method in self.methods]):
            order = self.runs[place[0].run][0]
            here = {"backbone": self.backbone, "task": self.title, "method": place[0].method, "seed": place[0].run}
            done = [folder.row(cell.key) for cell in place]
            scores = np.array(
                [[row["metrics"]["test"][f"{task}/accuracy"] for task in order] for row in done if row is not None]
            ).reshape(-1, len(order))
            stages += [
                {**here, "stage": at + 1, "place": to + 1, "learned": task, "accuracy": value}
                for at, row in enumerate(scores)
                for to, (task, value) in enumerate(zip(order, row, strict=True))
            ]
            rows += _rows(here, place, done, scores, folder)
            if len(scores) == len(order):
                examples += _examples(here, place, order, scores, folder)
                if (said := (done[-1] or {})["metrics"].get("plain_text")) is not None:
                    examples.append(here | {"split": "test", "metric": RISE, "scores": [said["rise"]]})
        return Measured(
            {
                "results": results_frame(rows, folder.path.name),
                "examples": examples_frame(examples, folder.path.name),
                STAGES: pd.DataFrame(stages, columns=["method", "seed", "stage", "place", "learned", "accuracy"]),
            }
        )

    def notes(self, cells: Sequence[Cell], folder: StudyFolder, results: Sequence[Results]) -> list[str]:
        orders = "; ".join(
            f"seed {run}: {' > '.join(order)}, seed {seed}" for run, (order, seed) in enumerate(self.runs)
        )
        lines = [
            "OP is the mean accuracy over all tasks after the last stage; BWT the mean change of a task's accuracy "
            "from the stage that learned it to the last one, the last task left out; PD sums what each stage changed "
            "on earlier tasks (MoLA, App. C), which is 2/t times BWT; forgetting the best accuracy so far less the "
            "last one.",
            f"Runs, which the tables call seeds: {orders}.",
        ]
        for name, given in self.methods.items():
            if "rehearsed" in given:
                lines.append(f"{name} learns {given['rehearsed']} rows of each earlier task again at every stage.")
            if "loras" in given:
                lines.append(f"{name}: what it costs is without the training of its LoRAs of stage 2 and later.")
        chosen = {
            cell.method: folder.row(cell.search.key) for cell in cells if cell.search is not None and cell.run == 0
        }
        lines += [
            f"{name}: {', '.join(f'{key} {shown(value)}' for key, value in row['chosen'].items())}, chosen by learning "
            "all tasks at once, on validation rows."
            for name, row in chosen.items()
            if row is not None
        ]
        return lines


def curves(study: StudyFolder) -> pd.DataFrame | None:
    """Accuracy on each task after each stage, as a study kept it: method, seed (the run), stage, place, learned (the
    task), accuracy; None where it has none.
    """
    path = study.path / f"{STAGES}.parquet"
    return read_table(path, "method", "seed", "stage", "place", "accuracy") if path.is_file() else None


def _check_composing(name: str, given: Mapping[str, Any]) -> None:
    composes = _composes(given)
    if composes != ("loras" in given):
        raise LamellaError(f"methods.{name}: 'loras' and a method over LoRAs, such as mole, belong together.")
    if composes and not given.get("rehearsed"):
        raise LamellaError(
            f"methods.{name} puts LoRAs of several tasks together and has no row of the earlier ones to learn their "
            "heads and routing from. Give 'rehearsed', the rows of each."
        )


def _composes(given: Mapping[str, Any]) -> bool:
    return issubclass(registered(method_values(given["method"])["name"]), ComposingMethod)


def _stages(study: Continual, name: str, order: tuple[str, ...], seed: int, run: int) -> list[Cell]:
    """A method's stages one after the other, and before them the LoRAs that they are made from."""
    given = study.methods[name]
    if _composes(given):
        return _composed_stages(study, name, order, seed, run)
    cells: list[Cell] = []
    for number in range(1, len(order) + 1):
        start = None if not cells else f"{LORA}{cells[-1].key}"
        method = _at_stage(method_from(given["method"]), number)
        settings = _settings(study, name, order, number, seed, method, start)
        cells.append(_cell(study, name, order, number, run, settings))
    return cells


def _composed_stages(study: Continual, name: str, order: tuple[str, ...], seed: int, run: int) -> list[Cell]:
    given = study.methods[name]
    alone = [
        _cell(study, f"{name}: LoRA", order, number, run,
              _settings(study, name, order, number, seed, method_from(given["loras"]), None, rehearsed=0))
        for number in range(1, len(order) + 1)
    ]  # fmt: skip
    stages = [replace(alone[0], method=name)]
    for number in range(2, len(order) + 1):
        named = {f"task{at + 1}": f"{LORA}{cell.key}" for at, cell in enumerate(alone[:number])}
        method = method_from({**method_values(given["method"]), "adapters": named})
        settings = _settings(study, name, order, number, seed, method, None)
        stages.append(replace(_cell(study, name, order, number, run, settings), search=None))
    return [*alone, *stages]


def _at_stage(method: Method, number: int) -> Method:
    """A method that grows has grown so often."""
    return method.model_copy(update={"stage": number}) if "stage" in type(method).model_fields else method


def _settings(
    study: Continual,
    name: str,
    order: tuple[str, ...],
    number: int,
    seed: int,
    method: Method,
    start: str | None,
    rehearsed: int | None = None,
) -> RunSettings:
    given = study.methods[name]
    again = given.get("rehearsed", 0) if rehearsed is None and number > 1 else 0
    task = f"learn:{number}{f'/{again}' if again else ''}:{'+'.join(order)}"
    of_run = study.run | {key: value for key, value in given.items() if key not in _OWN}
    placed = {"model": study.backbone, "task": task, "seed": seed, "method": method, "start": start}
    return method_settings(of_run | placed)


def _cell(study: Continual, name: str, order: tuple[str, ...], number: int, run: int, settings: RunSettings) -> Cell:
    part = f"{order[number - 1]} as stage {number}"
    cell = Cell(study.backbone, study.title, name, settings, part=part, run=run)
    if study.search is None:
        return cell
    at_once: dict[str, Any] = {"task": joint_name(study.sequence), "start": None}
    if settings.max_steps is not None:
        at_once["max_steps"] = settings.max_steps * len(study.sequence)
    searched = replace(cell, settings=changed(settings, at_once), part="all tasks at once", run=0)
    if "stage" in type(settings.method).model_fields:
        searched = replace(searched, settings=changed(searched.settings, {"method.stage": 1}))
    return replace(cell, search=search_of(searched, study.search))


def _rows(
    here: dict[str, Any],
    place: Sequence[Cell],
    done: Sequence[Mapping[str, Any] | None],
    scores: Floats,
    folder: StudyFolder,
) -> list[dict[str, Any]]:
    """A row per measure of a method's run; its costs are those of all its stages."""
    last = done[-1]
    named = here | {"key": place[-1].key, "split": "test"}
    if last is None or len(scores) < len(place):
        return [
            named | {"metric": one.name, "greater_is_better": one.greater_is_better, "status": "not run"}
            for one in MEASURES
        ]
    metrics = [row["metrics"] for row in done if row is not None]
    costs = {name: metrics[-1].get(name) for name in COSTS} | united_costs(metrics)
    costs["entropy"] = (metrics[-1].get("routing") or {}).get("entropy")
    search = None if place[0].search is None else folder.row(place[0].search.key)
    costs["search_seconds"] = None if search is None else search["seconds"]
    values = [
        *((one.name, one.function(scores), one.greater_is_better) for one in MEASURES),
        *([(RISE, metrics[-1]["plain_text"]["rise"], False)] if "plain_text" in metrics[-1] else []),
    ]
    return [
        named | {"metric": name, "value": value, "greater_is_better": greater, "status": "done", **costs}
        for name, value, greater in values
    ]


def _examples(
    here: dict[str, Any], place: Sequence[Cell], order: Sequence[str], scores: Floats, folder: StudyFolder
) -> list[dict[str, Any]]:
    """Rows of the table of example scores; tasks in one order for all runs, so that examples are paired."""
    named = here | {"split": "test"}
    after = [scores_by_task(folder.run(cell.key)) for cell in place]
    if any(set(one) != set(order) for one in after):
        raise UnreadableError(f"{folder.run(place[-1].key)} lacks predictions of some task. Run it again with --force.")
    learned = {task: after[at][task] for at, task in enumerate(order)}
    single = example_scores(learned, {task: after[-1][task] for task in order})
    rows = []
    for measure in MEASURES:
        if measure.name in single:
            by_task = [single[measure.name][task] for task in sorted(order)]
            strata = [len(one) for one in by_task]
            rows.append(named | {"metric": measure.name, "scores": np.concatenate(by_task), "strata": strata})
        else:
            rows.append(named | {"metric": measure.name, "scores": [measure.function(scores)]})
    return rows
