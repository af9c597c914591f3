"""Studies of methods side by side: backbones, tasks, seeds and methods become cells, each with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from lamella.errors import LamellaError
from lamella.lab.data.derived import parts_of
from lamella.lab.methods import Method, method_from
from lamella.lab.methods.base import method_values
from lamella.lab.metrics import METRICS
from lamella.lab.runs.plain_text import RISE
from lamella.lab.runs.settings import RunSettings, changed, joint_name
from lamella.lab.runs.tasks import task_of
from lamella.lab.schema import unknown_key
from lamella.lab.scoring import selection
from lamella.lab.studies.cells import LORA, Cell
from lamella.lab.studies.places import Floors, by_place, examples_of_place, metrics_of_place
from lamella.lab.studies.recipe import (
    Measured,
    StudyRecipe,
    TableOf,
    check_name,
    method_settings,
    refuse_without_method,
)
from lamella.lab.studies.results import COSTS, examples_frame, place_of, results_frame
from lamella.lab.studies.search import Searched, check_search, search_note, search_of

if TYPE_CHECKING:
    from lamella.lab.data import Task
    from lamella.lab.studies.folder import StudyFolder
    from lamella.lab.studies.results import Results

# what decides how many tokens a run trains on
_COMPUTE = (
    "epochs",
    "max_steps",
    "batch_size",
    "accumulation",
    "max_length",
    "limit",
    "packing",
)


class Grid(StudyRecipe):
    """Every method on every backbone and task with every seed."""

    backbones: list[str] = Field(min_length=1, description="demo assets, hub ids or paths of the models")
    tasks: list[str] = Field(min_length=1, description="a list among them is several tasks for one model")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="by the name that tables show: 'method', any setting of its runs, 'apart' for a run on each of "
        "several tasks, of its share of the steps, and of a method over LoRAs 'loras', whose runs apart these are",
    )
    budget: Literal["equal-parameters", "equal-compute", "none"] = Field(
        "none", description="what is equal: trainable parameters and training tokens, these tokens alone, or nothing"
    )
    match: str | None = Field(None, description="equal-parameters: the method whose size the others get")
    search: Searched | None = Field(None, description="settings that are chosen for each method, on validation rows")

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, tasks: Any) -> Any:
        return (
            [joint_name(one) if isinstance(one, list) else one for one in tasks] if isinstance(tasks, list) else tasks
        )

    @property
    def names(self) -> list[str]:
        return list(self.methods)

    @property
    def listed(self) -> list[str]:
        return self.names

    @property
    def tables(self) -> list[TableOf]:
        several = len(self.backbones) > 1
        return [
            TableOf(backbone, task, metric, f"{title}, {backbone}" if several else title, part=metric is not None)
            for backbone, task in product(self.backbones, self.tasks)
            for metric, title in [(None, task), *((f"{part}/accuracy", part) for part in parts_of(task))]
        ] + [
            TableOf(backbone, task, RISE, f"{RISE} ({task}{f', {backbone}' if several else ''})")
            for backbone, task in product(self.backbones, self.tasks)
            if "plain_text" in self.run
        ]

    def check(self) -> None:
        for key in ("match", "reference"):
            if (name := getattr(self, key)) is not None:
                check_name(name, self.methods, f"method for '{key}'")
        known = [key for key in RunSettings.model_fields if key not in ("model", "task", "seed")]
        places = {
            "run.": self.run,
            **{f"methods.{name}.": _of_runs(given) for name, given in self.methods.items()},
        }
        for place, values in places.items():
            if unknown := [key for key in values if key not in known]:
                raise LamellaError(unknown_key(unknown[0], known, place))
        if "method" in self.run:
            raise LamellaError("run.method would give every method of the study the same one. Set it under 'methods'.")
        refuse_without_method(self.methods, "lora")
        if (self.budget == "equal-parameters") != (self.match is not None):
            raise LamellaError("'budget: equal-parameters' and 'match' belong together: match names whose size counts.")
        if self.match is not None and "loras" in self.methods[self.match]:
            raise LamellaError(
                f"match names {self.match}, whose size hangs on its LoRAs. Name one of the other methods."
            )
        if self.budget != "none":
            _check_compute(self)
        apart = [name for name in self.methods if self.apart(name)]
        if apart and not any(map(parts_of, self.tasks)):
            raise LamellaError(f"methods.{apart[0]}.apart needs several tasks for one model: a list among 'tasks'.")
        for name, given in self.methods.items():
            if "loras" in given and not (given["loras"] in apart and all(map(parts_of, self.tasks))):
                raise LamellaError(
                    f"methods.{name}.loras is {given['loras']!r}, and must name a method with 'apart: true', whose "
                    "runs on each of several tasks leave LoRAs."
                )
        if self.search is not None:
            _check_search(self, self.search)

    def apart(self, method: str) -> bool:
        """Whether a method has a run for each of several tasks."""
        return bool(self.methods[method].get("apart", False))

    def cells(self) -> list[Cell]:
        methods = _budgeted(self)
        cells: list[Cell] = []
        for seed, backbone, task in product(self.seed_list, self.backbones, self.tasks):
            here = {
                name: self._searched(_cells(self, name, backbone, task, seed, method))
                for name, method in methods.items()
            }
            for name, given in self.methods.items():
                if "loras" in given:
                    composed = _composed(self, name, backbone, task, seed, here[given["loras"]])
                    here[name] = self._searched([composed])
            cells += [cell for name in self.methods for cell in here[name]]
        return cells

    def _searched(self, cells: list[Cell]) -> list[Cell]:
        if self.search is None:
            return cells
        return [replace(cell, search=search_of(cell, self.search)) for cell in cells]

    def measured(self, cells: Sequence[Cell], folder: StudyFolder) -> Measured:
        rows, examples, notes = [], [], []
        for name in self.tasks:
            here = [cell for cell in cells if cell.task == name]
            task = task_of(changed(here[0].settings, {"task": name}))
            floors = Floors.of(task)
            notes += [note for note in task.notes if note not in notes]
            for backbone in self.backbones:
                examples += floors.examples(backbone, name)
            for place in by_place(here):
                metrics = metrics_of_place(place, folder)
                rows += _rows(place, task, floors, metrics, _search_seconds(place, folder))
                if metrics is not None and "test" in metrics:
                    examples += examples_of_place(place, metrics, folder)
        return Measured(
            {
                "results": results_frame(rows, folder.path.name),
                "examples": examples_frame(examples, folder.path.name),
            },
            notes,
        )

    def notes(self, cells: Sequence[Cell], folder: StudyFolder, results: Sequence[Results]) -> list[str]:
        composing = [
            f"{name}: what it costs is beside the LoRAs it puts together, whose training counts for {given['loras']}."
            for name, given in self.methods.items()
            if "loras" in given
        ]
        return composing + [
            line
            for table in results
            if not table.part
            for line in (*_budget_notes(self, table, cells, folder), *_search_notes(self, table, cells, folder))
        ]


def _cells(grid: Grid, name: str, backbone: str, task: str, seed: int, method: Method) -> list[Cell]:
    """One run, or one for each of several tasks with its share of the steps."""
    settings = _settings(grid, name, backbone, task, seed, method)
    parts = parts_of(task) if grid.apart(name) else []
    if not parts:
        return [Cell(backbone, task, name, settings)]
    share = {} if settings.max_steps is None else {"max_steps": max(1, round(settings.max_steps / len(parts)))}
    return [Cell(backbone, task, name, changed(settings, {"task": part, **share}), part=part) for part in parts]


def _settings(grid: Grid, name: str, backbone: str, task: str, seed: int, method: Method) -> RunSettings:
    given = {key: value for key, value in _of_runs(grid.methods[name]).items() if key != "method"}
    return method_settings(grid.run | given | {"model": backbone, "task": task, "seed": seed, "method": method})


def _composed(grid: Grid, name: str, backbone: str, task: str, seed: int, loras: Sequence[Cell]) -> Cell:
    """A run that composes the LoRAs of runs on each of several tasks."""
    given = grid.methods[name]["method"]
    adapters = {f"task{number}": f"{LORA}{cell.key}" for number, cell in enumerate(loras, start=1)}
    method = method_from({**method_values(given), "adapters": adapters})
    return Cell(backbone, task, name, _settings(grid, name, backbone, task, seed, method))


def _of_runs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is no setting of a run."""
    return {key: value for key, value in given.items() if key not in ("apart", "loras")}


def _check_compute(grid: Grid) -> None:
    for name, given in grid.methods.items():
        if differing := [key for key in _COMPUTE if key in given]:
            raise LamellaError(
                f"methods.{name}.{differing[0]} would train it on other tokens than the rest, and 'budget: "
                f"{grid.budget}' trains all on the same. Set {differing[0]} under 'run', or 'budget: none'."
            )


def _check_search(grid: Grid, search: Searched) -> None:
    cells = [cell for cell in grid.cells() if cell.seed == grid.seed_list[0]]
    check_search(search, grid.seed_list, cells, grid.run, grid.methods)
    if grid.budget == "equal-parameters" and (sizes := [key for key in search.space if key in _SIZES]):
        raise LamellaError(
            f"search.space.{sizes[0]} would change how many parameters a method trains, and 'budget: equal-parameters' "
            "keeps them equal. Leave one of them out."
        )


def _budgeted(grid: Grid) -> dict[str, Method]:
    """The methods; with equal parameters, MoLA's shapes get one mean of experts, and LoRA's rank is matched."""
    methods = {
        name: RunSettings.parse({"method": given["method"]}).method
        for name, given in grid.methods.items()
        if "loras" not in given  # which LoRAs these compose is known when the runs are planned
    }
    if grid.match is None:
        return methods
    if (mean := methods[grid.match].mean_experts()) is not None:
        methods = {name: method.with_mean_experts(mean, f"methods.{name}") for name, method in methods.items()}
    matched = methods[grid.match]
    return {
        name: method if name == grid.match else method.with_parameters_of(matched) for name, method in methods.items()
    }


_SIZES = ("method.r", "method.num_experts", "method.target_modules", "method.expert_budget")


def _search_seconds(place: Sequence[Cell], folder: StudyFolder) -> float | None:
    """What finding the settings of a place's runs took."""
    searches = [folder.row(cell.search.key) for cell in place if cell.search is not None]
    done = [row["seconds"] for row in searches if row is not None]
    return sum(done) if done else None


def _rows(
    cells: Sequence[Cell], task: Task, floors: Floors, metrics: Mapping[str, Any] | None, search_seconds: float | None
) -> list[dict[str, Any]]:
    """A row per split and metric of a place; one without a value where it was not run."""
    place = place_of(cells[0]) | {"key": cells[0].key}
    if metrics is None:
        main = selection(task)
        better = {"metric": main.name, "greater_is_better": main.greater_is_better}
        return [place | {"split": "test", "status": "not run", **better}]
    costs = {name: metrics.get(name) for name in COSTS}
    costs |= {
        f"alpha_{when}": float(np.mean(list(alphas.values()))) for when, alphas in metrics.get("alpha", {}).items()
    }
    costs["entropy"] = (metrics.get("routing") or {}).get("entropy")
    costs["search_seconds"] = search_seconds
    return [
        {
            **place,
            "split": split,
            "metric": metric,
            "value": value,
            "greater_is_better": (kind := metric.rpartition("/")[2]) in METRICS and METRICS[kind].greater_is_better,
            "status": "done",
            **floors.scores.get(split, {}).get(metric, {}),
            **costs,
        }
        for split in ("validation", "test")
        if split in metrics
        for metric, value in metrics[split].items()
    ]


def _budget_notes(grid: Grid, results: Results, cells: Sequence[Cell], folder: StudyFolder) -> list[str]:
    measured: dict[str, dict[str, Any]] = {}
    for place in by_place(cells):
        cell = place[0]
        here = (cell.backbone, cell.task) == (results.backbone, results.task)
        if here and cell.method not in measured and (metrics := metrics_of_place(place, folder)) is not None:
            measured[cell.method] = metrics
    counts = ", ".join(f"{name} {one['trainable_parameters']:,}" for name, one in measured.items())
    tokens = ", ".join(f"{name} {one['tokens']:,}" for name, one in measured.items())
    lines = []
    if grid.budget == "equal-parameters" and counts:
        lines.append(
            f"Trainable parameters on {results.backbone}, task head included: {counts}. LoRA's rank and the experts "
            f"of MoLA's shapes were chosen to equal {grid.match}; other methods have the size that they have."
        )
    if grid.budget != "none" and tokens:
        lines.append(f"Training tokens on {results.task} with {results.backbone}: {tokens}.")
    for name, one in measured.items():
        if "matched_method" in one:
            whose = grid.match or one["matched_method"]
            lines.append(
                f"{name}: rank {one['rank']} was chosen, so that its {one['trainable_parameters']:,} trainable "
                f"parameters come nearest to the {one['matched_parameters']:,} of {whose}."
            )
    return lines


def _search_notes(grid: Grid, results: Results, cells: Sequence[Cell], folder: StudyFolder) -> list[str]:
    """What was chosen for each method on this backbone and task."""
    here = [cell for cell in cells if (cell.backbone, cell.task) == (results.backbone, results.task)]
    note = None if grid.search is None else search_note(grid.search, here, folder)
    return [] if note is None else [f"On {results.task} with {results.backbone}: {note}"]
