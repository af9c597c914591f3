"""Studies of methods side by side: backbones, tasks, seeds and methods become cells, each with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from lamella.errors import LamellaError, UnreadableError
from lamella.lab.methods import Method
from lamella.lab.metrics import METRICS, metric_for
from lamella.lab.runs.floors import FLOOR, MAJORITY, floor_predictions
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.settings import RunSettings, changed
from lamella.lab.runs.tasks import task_of
from lamella.lab.schema import unknown_key
from lamella.lab.scoring import selection
from lamella.lab.studies.cells import Cell
from lamella.lab.studies.recipe import Measured, StudyRecipe, TableOf, check_name, method_settings
from lamella.lab.studies.results import COSTS, Floats, examples_frame, place_of, results_frame
from lamella.lab.studies.search import Range, Searched, has, search_of

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

    backbones: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by the name that tables show: 'method', and any setting of its runs"
    )
    budget: Literal["equal-parameters", "equal-compute", "none"] = "none"
    match: str | None = Field(None, description="equal-parameters: the method whose size the others get")
    search: Searched | None = Field(None, description="settings that are chosen for each method, on validation rows")

    @property
    def names(self) -> list[str]:
        return list(self.methods)

    @property
    def shown(self) -> list[str]:
        return self.names

    @property
    def tables(self) -> list[TableOf]:
        several = len(self.backbones) > 1
        return [
            TableOf(backbone, task, None, f"{task}, {backbone}" if several else task)
            for backbone, task in product(self.backbones, self.tasks)
        ]

    def check(self) -> None:
        for key in ("match", "reference"):
            if (name := getattr(self, key)) is not None:
                check_name(name, self.methods, f"method for '{key}'")
        known = [key for key in RunSettings.model_fields if key not in ("model", "task", "seed")]
        places = {"run.": self.run, **{f"methods.{name}.": given for name, given in self.methods.items()}}
        for place, values in places.items():
            if unknown := [key for key in values if key not in known]:
                raise LamellaError(unknown_key(unknown[0], known, place))
        if "method" in self.run:
            raise LamellaError("run.method would give every method of the study the same one. Set it under 'methods'.")
        if lacking := [name for name, given in self.methods.items() if "method" not in given]:
            raise LamellaError(
                f"methods.{lacking[0]} does not say which method it is. Add a line 'method: lora', for example."
            )
        if (self.budget == "equal-parameters") != (self.match is not None):
            raise LamellaError("'budget: equal-parameters' and 'match' belong together: match names whose size counts.")
        if self.budget != "none":
            _check_compute(self)
        if self.search is not None:
            _check_search(self, self.search)

    def cells(self) -> list[Cell]:
        methods = _budgeted(self)
        cells = [
            Cell(backbone, task, name, _settings(self, name, backbone, task, seed, methods[name]))
            for seed, backbone, task, name in product(self.seed_list, self.backbones, self.tasks, methods)
        ]
        if self.search is None:
            return cells
        return [replace(cell, search=search_of(cell, self.search)) for cell in cells]

    def measured(self, cells: Sequence[Cell], folder: StudyFolder) -> Measured:
        rows, examples, notes = [], [], []
        for name in self.tasks:
            here = [cell for cell in cells if cell.task == name]
            task = task_of(here[0].settings)
            floors = Floors.of(task)
            notes += [note for note in task.notes if note not in notes]
            for backbone in self.backbones:
                examples += floors.examples(backbone, name)
            for cell in here:
                row = folder.row(cell.key)
                search = None if cell.search is None else folder.row(cell.search.key)
                rows += _rows(cell, task, floors, row, search)
                if row is not None and "test" in row["metrics"]:
                    metric = row["metrics"]["metric"]
                    scores = example_scores(metric, folder.run(cell.key))
                    examples.append(
                        place_of(cell)
                        | {"split": "test", "metric": metric}
                        | {"scores": [row["metrics"]["test"][metric]] if scores is None else scores}
                    )
        return Measured(
            {
                "results": results_frame(rows, folder.path.name),
                "examples": examples_frame(examples, folder.path.name),
            },
            notes,
        )

    def notes(self, cells: Sequence[Cell], folder: StudyFolder, results: Sequence[Results]) -> list[str]:
        return [
            line
            for table in results
            for line in (*_budget_notes(self, table, cells, folder), *_search_notes(self, table, cells, folder))
        ]


def _settings(grid: Grid, name: str, backbone: str, task: str, seed: int, method: Method) -> RunSettings:
    given = {key: value for key, value in grid.methods[name].items() if key != "method"}
    return method_settings(grid.run | given | {"model": backbone, "task": task, "seed": seed, "method": method})


def _check_compute(grid: Grid) -> None:
    for name, given in grid.methods.items():
        if differing := [key for key in _COMPUTE if key in given]:
            raise LamellaError(
                f"methods.{name}.{differing[0]} would train it on other tokens than the rest, and 'budget: "
                f"{grid.budget}' trains all on the same. Set {differing[0]} under 'run', or 'budget: none'."
            )


def _check_search(grid: Grid, search: Searched) -> None:
    if search.seed in grid.seed_list:
        raise LamellaError(
            f"search.seed={search.seed} is one of the study's seeds, whose runs are to be new to what was chosen. Give "
            "another one."
        )
    cells = [replace(cell, search=None) for cell in grid.cells() if cell.seed == grid.seed_list[0]]
    for key, values in search.space.items():
        having = [cell.settings for cell in cells if has(cell.settings, key)]
        if not having:
            raise LamellaError(f"search.space.{key} is a setting of none of the methods: {', '.join(grid.names)}.")
        given = [("run", grid.run), *((f"methods.{name}", one) for name, one in grid.methods.items())]
        for place, one in given:
            method = one.get("method")
            if key in one or (isinstance(method, dict) and key.startswith("method.") and key[7:] in method):
                raise LamellaError(f"{place} gives {key}, which search.space chooses too. Leave one of them out.")
        if grid.budget == "equal-parameters" and key in _SIZES:
            raise LamellaError(
                f"search.space.{key} would change how many parameters a method trains, and 'budget: equal-parameters' "
                "keeps them equal. Leave one of them out."
            )
        for value in [values.low, values.high] if isinstance(values, Range) else values:
            for settings in having:
                changed(settings, {key: value})


def _budgeted(grid: Grid) -> dict[str, Method]:
    """The methods; with equal parameters, MoLA's shapes get one mean of experts, and LoRA's rank is matched."""
    methods = {name: RunSettings.parse({"method": given["method"]}).method for name, given in grid.methods.items()}
    if grid.match is None:
        return methods
    if (mean := methods[grid.match].mean_experts()) is not None:
        methods = {name: method.with_mean_experts(mean, f"methods.{name}") for name, method in methods.items()}
    matched = methods[grid.match]
    return {
        name: method if name == grid.match else method.with_parameters_of(matched) for name, method in methods.items()
    }


_SIZES = ("method.r", "method.num_experts", "method.target_modules", "method.expert_budget")

# metrics that are the mean of a column of predictions.parquet: what a bootstrap over examples can resample
_COLUMNS = {"accuracy": "correct", "mean_squared_error": "squared_error"}


def example_scores(metric: str, run: Path) -> Floats | None:
    """Scores of a run's test examples (examples,); None where the metric is not their mean."""
    column = _COLUMNS.get(metric)
    if column is None:
        return None
    frame = RunFolder(run).table("predictions.parquet", "split", column)
    if frame is None:
        raise UnreadableError(f"{run} has no predictions.parquet. Restore it from a copy, or run it again.")
    return frame.loc[frame["split"] == "test", column].to_numpy(np.float64)


@dataclass(frozen=True)
class Floors:
    """What needs no language model: scores by split, metric and floor; and whether each test row is right, by floor."""

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    correct: Mapping[str, Floats]

    @classmethod
    def of(cls, task: Task) -> Floors:
        """A linear model of word counts, and the commonest label of the training rows."""
        scores: dict[str, dict[str, dict[str, float]]] = {}
        correct: dict[str, Floats] = {}
        regression = task.kind == "regression"
        metrics = sorted({task.metric, *(["mean_squared_error"] if regression else ["accuracy", "macro_f1"])})
        for floor, predictions in floor_predictions(task).items():
            word = {FLOOR: "linear", MAJORITY: "majority"}[floor]
            for split, guessed in predictions.items():
                labels = np.asarray(task.splits[split]["label"])
                for metric in metrics:
                    by_floor = scores.setdefault(split, {}).setdefault(metric, {})
                    by_floor[f"floor_{word}"] = metric_for(metric).function(guessed, labels)
                if split == "test" and task.metric == "accuracy":
                    correct[f"floor ({word})"] = (guessed == labels).astype(np.float64)
        return cls(scores, correct)

    def examples(self, backbone: str, task: str) -> list[dict[str, Any]]:
        """Rows of the table of example scores; a floor is the same for every seed and has none."""
        place = {"backbone": backbone, "task": task, "seed": -1, "split": "test", "metric": "accuracy"}
        return [place | {"method": floor, "scores": correct} for floor, correct in self.correct.items()]


def _rows(
    cell: Cell, task: Task, floors: Floors, row: Mapping[str, Any] | None, search: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """A row per split and metric of a cell; one without a value where it was not run."""
    place = place_of(cell) | {"key": cell.key}
    main = selection(task)
    if row is None:
        better = {"metric": main.name, "greater_is_better": main.greater_is_better}
        return [place | {"split": "test", "status": "not run", **better}]
    metrics = row["metrics"]
    costs = {name: metrics.get(name) for name in COSTS}
    costs |= {
        f"alpha_{when}": float(np.mean(list(alphas.values()))) for when, alphas in metrics.get("alpha", {}).items()
    }
    costs["entropy"] = (metrics.get("routing") or {}).get("entropy")
    costs["search_seconds"] = None if search is None else search["seconds"]
    return [
        {
            **place,
            "split": split,
            "metric": metric,
            "value": value,
            "greater_is_better": metric in METRICS and METRICS[metric].greater_is_better,
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
    for cell in cells:
        here = (cell.backbone, cell.task) == (results.backbone, results.task)
        if here and cell.method not in measured and (row := folder.row(cell.key)) is not None:
            measured[cell.method] = row["metrics"]
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
    """What was chosen for each method, out of how many tries, and how long that took."""
    chosen: dict[str, str] = {}
    for cell in cells:
        here = (cell.backbone, cell.task) == (results.backbone, results.task)
        if here and cell.search is not None and (row := folder.row(cell.search.key)) is not None:
            values = ", ".join(f"{key} {_shown(value)}" for key, value in row["chosen"].items())
            failed = sum("failed" in one for one in row["tries"])
            errors = f", {failed} tries ended in an error" if failed else ""
            chosen[cell.method] = f"{cell.method} {values} ({row['seconds']:.0f} s{errors})"
    if grid.search is None or not chosen:
        return []
    return [
        f"Settings on {results.task} with {results.backbone} were searched alike: {grid.search.tries} tries for each "
        f"method, seed {grid.search.seed}, the better half of them trained twice as long, twice; the best on "
        f"validation rows: {'; '.join(chosen.values())}."
    ]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
