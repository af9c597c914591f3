"""One schema for the results of every study, and one table of methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lamella.statistics import Contrast, contrast, mean_intervals

if TYPE_CHECKING:
    from lamella.lab.studies.cells import Cell
    from lamella.lab.studies.recipe import StudyRecipe, TableOf

Floats = npt.NDArray[np.float64]

FLOORS = ("linear", "majority", "chance")
PLACE = ["study", "backbone", "task", "method", "seed", "split", "metric"]
COSTS = (
    "trainable_parameters", "build_seconds", "train_seconds", "seconds_per_step", "tokens", "peak_memory_bytes",
    "steps", "kept_step",
)  # fmt: skip
_RESULTS = [
    *PLACE, "value", "greater_is_better", *(f"floor_{word}" for word in FLOORS), "status", "key", *COSTS, "entropy",
    "alpha_start", "alpha_end", "search_seconds",
]  # fmt: skip


def place_of(cell: Cell) -> dict[str, Any]:
    """The columns that say which cell a row is of."""
    return {"backbone": cell.backbone, "task": cell.task, "method": cell.method, "seed": cell.seed}


def results_frame(rows: Sequence[Mapping[str, Any]], study: str) -> pd.DataFrame:
    """A row per cell, split and metric.

    Columns: study, backbone, task, method, seed, split, metric, value, greater_is_better, floor_linear,
    floor_majority, floor_chance, status ("done" or "not run"), key, what the run cost, the routers' entropy (nats),
    MoLEx's learned alpha before and after, and seconds of the search for its settings. A cell that was not run has one
    row without values.
    """
    return pd.DataFrame(rows).assign(study=study).reindex(columns=_RESULTS)


def examples_frame(rows: Sequence[Mapping[str, Any]], study: str) -> pd.DataFrame:
    """What the values are means of: scores of the single examples (float32), in the order of the test rows.

    Where the metric is not a mean over examples, the value alone. A floor has the seed -1. Where the value is a mean
    over several tasks, ``strata`` says how many of the examples are of each.
    """
    columns = ["scores", *["strata"] * any("strata" in row for row in rows)]
    frame = pd.DataFrame(rows, columns=[*PLACE[1:], *columns]).assign(study=study)
    return frame.assign(scores=[np.asarray(one, np.float32) for one in frame["scores"]])[[*PLACE, *columns]]


@dataclass(frozen=True)
class Results:
    """The methods of a study in one table: one backbone, task and metric.

    Attributes:
        title: what tables call the task.
        part: whether another table unites it with others.
        metric: None before anything was run; ``greater_is_better`` belongs to it.
        names: the methods, in the recipe's order.
        values: of the test rows, by method and seed.
        validation: the same of the validation rows.
        scores: of the single test examples, by method and seed.
        floors: by word, then split.
        floor_scores: of the single test examples, by word, where the floor has any.
        rows: of the table in the schema of all results, finished ones only.
        strata: how many of the examples each of several tasks has, whose means count alike.
    """

    backbone: str
    task: str
    title: str
    part: bool
    metric: str | None
    greater_is_better: bool
    names: Sequence[str]
    seeds: Sequence[int]
    reference: str
    values: Mapping[str, Mapping[int, float]]
    validation: Mapping[str, Mapping[int, float]]
    scores: Mapping[str, Mapping[int, Floats]]
    floors: Mapping[str, Mapping[str, float]]
    floor_scores: Mapping[str, Floats]
    rows: pd.DataFrame
    strata: Sequence[int] = ()

    @property
    def run(self) -> int:
        """Number of cells that have a value."""
        return sum(map(len, self.values.values()))

    @property
    def planned(self) -> int:
        """Number of cells that the recipe plans."""
        return len(self.names) * len(self.seeds)

    @cached_property
    def means(self) -> dict[str, float]:
        """Over the seeds, of the methods that were run."""
        return {name: float(np.mean(list(values.values()))) for name, values in self.values.items() if values}

    @cached_property
    def against_reference(self) -> list[Contrast]:
        """Every other method minus the reference."""
        return self.contrasts([(name, self.reference) for name in self.names if name != self.reference])

    def contrasts(self, pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
        """The paired differences of those pairs that share a seed; p-values are corrected over them."""
        return contrast(self.scores, pairs, self.strata)

    def better(self, one: Contrast) -> bool:
        """Whether the first of two is the better one."""
        return (one.interval.difference > 0) == self.greater_is_better


def results_of(recipe: StudyRecipe, results: pd.DataFrame, examples: pd.DataFrame) -> list[Results]:
    """The tables of a study from its rows."""
    return [_results(recipe, table, results, examples) for table in recipe.tables]


def _results(recipe: StudyRecipe, table: TableOf, results: pd.DataFrame, examples: pd.DataFrame) -> Results:
    place = {"backbone": table.backbone, "task": table.task}
    rows, examples = (_where(frame, **place) for frame in (results, examples))
    rows = rows[rows["status"] == "done"]
    metric = table.metric
    if metric is None and len(examples):
        metric = str(examples["metric"].iloc[-1])  # the floors come first, and have an accuracy whatever the task's is
    rows, examples = (_where(frame, metric=metric) for frame in (rows, examples))
    values: dict[str, dict[str, dict[int, float]]] = {
        split: {name: {} for name in recipe.names} for split in ("validation", "test")
    }
    for split, method, seed, value in zip(rows["split"], rows["method"], rows["seed"], rows["value"], strict=True):
        values[split][method][int(seed)] = value
    scores: dict[str, dict[int, Floats]] = {name: {} for name in recipe.names}
    floor_scores: dict[str, Floats] = {}
    for method, seed, one in zip(examples["method"], examples["seed"], examples["scores"], strict=True):
        if method in scores:
            scores[method][int(seed)] = np.asarray(one, np.float64)
        else:
            floor_scores[method.removeprefix("floor (").removesuffix(")")] = np.asarray(one, np.float64)
    floors: dict[str, dict[str, float]] = {}
    for word in FLOORS:
        for split, value in rows.drop_duplicates("split").set_index("split")[f"floor_{word}"].items():
            if not pd.isna(value):
                floors.setdefault(word, {})[str(split)] = float(value)
    return Results(
        backbone=table.backbone,
        task=table.task,
        title=table.title,
        part=table.part,
        metric=metric if len(rows) else None,
        greater_is_better=bool(rows["greater_is_better"].iloc[0]) if len(rows) else True,
        names=recipe.names,
        seeds=recipe.seed_list,
        reference=recipe.reference_name,
        values=values["test"],
        validation=values["validation"],
        scores=scores,
        floors=floors,
        floor_scores=floor_scores,
        rows=rows[rows["split"] == "test"],
        strata=_strata(examples),
    )


def _strata(examples: pd.DataFrame) -> list[int]:
    if "strata" not in examples:  # no table of the study is over several tasks
        return []
    return next(([int(count) for count in one] for one in examples["strata"] if isinstance(one, list | np.ndarray)), [])


def _where(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return frame


def results_table(results: Sequence[Results]) -> pd.DataFrame:
    """A row per floor and method: task, metric, validation, a column per seed, mean, interval, and the difference
    from the reference with its interval and Holm's p-value. Empty cells were not run.
    """
    rows = [row for one in results for row in (*_floor_rows(one), *_method_rows(one))]
    seeds = list(dict.fromkeys(f"seed {seed}" for one in results for seed in one.seeds))
    validation = ["validation"] * any("validation" in row for row in rows)
    columns = ["method", "task", "metric", *validation, *seeds, "mean", "interval", "difference", "p"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _floor_rows(results: Results) -> list[dict[str, Any]]:
    intervals = mean_intervals({word: {0: scores} for word, scores in results.floor_scores.items()}, results.strata)
    return [
        {
            "method": f"floor ({word})",
            "task": results.title,
            "metric": results.metric,
            **({"validation": splits["validation"]} if "validation" in splits else {}),
            # a floor has no randomness: it is the same for every seed
            **{f"seed {seed}": splits.get("test") for seed in results.seeds},
            "mean": splits.get("test"),
            # words, because an empty cell says that something was not run
            "interval": intervals.get(word, ""),
            "difference": "floor",
            "p": "",
        }
        for word, splits in results.floors.items()
    ]


def _method_rows(results: Results) -> list[dict[str, Any]]:
    intervals = mean_intervals(results.scores, results.strata)
    differences = {one.first: one for one in results.against_reference}
    rows = []
    for name in results.names:
        row: dict[str, Any] = {"method": name, "task": results.title, "metric": results.metric}
        if validation := list(results.validation[name].values()):
            row["validation"] = float(np.mean(validation))
        row |= {f"seed {seed}": results.values[name].get(seed) for seed in results.seeds}
        row |= {"mean": results.means.get(name), "interval": intervals.get(name)}
        if name == results.reference:
            row |= {"difference": "reference", "p": ""}
        elif name in differences:
            row |= {"difference": str(differences[name].interval), "p": f"{differences[name].p_value:.3g}"}
        rows.append(row)
    return rows


def cost_table(recipe: StudyRecipe, results: pd.DataFrame) -> pd.DataFrame:
    """A row per method, backbone and task: parameters, median seconds to build and to train, largest memory, tokens.

    Of the tests of a study of composition, the first stands for all: the models are the same.
    """
    places = [(table.backbone, table.task) for table in recipe.tables if table.metric is None]
    rows = []
    for backbone, task in places or [(recipe.tables[0].backbone, recipe.tables[0].task)]:
        here = _where(results, backbone=backbone, task=task, status="done")
        for name in recipe.names:
            runs = here[here["method"] == name].drop_duplicates("seed")
            row: dict[str, Any] = {"method": name, "task": task, "backbone": backbone}
            if len(runs):
                row |= {
                    "trainable parameters": runs["trainable_parameters"].iloc[0],
                    "building seconds": runs["build_seconds"].median(),
                    "training seconds": runs["train_seconds"].median(),
                    **({"searching seconds": runs["search_seconds"].iloc[0]} if _searched(runs) else {}),
                    "peak memory MB": runs["peak_memory_bytes"].max() / 1e6,
                    "tokens": runs["tokens"].iloc[0],
                }
            rows.append(row)
    return pd.DataFrame(rows)


def _searched(runs: pd.DataFrame) -> bool:
    return "search_seconds" in runs and bool(runs["search_seconds"].notna().any())
