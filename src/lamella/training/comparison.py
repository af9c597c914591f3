"""Methods side by side: the same task, the same seeds, a floor below and an interval around the difference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from transformers import TrainerCallback

from lamella.data import Task
from lamella.evaluation.intervals import Interval, paired_interval
from lamella.evaluation.metrics import metric_for
from lamella.training.examples import example_scores, interval_around
from lamella.training.floors import FLOOR, floor_predictions
from lamella.training.folder import RunFolder
from lamella.training.run import RunResult, train
from lamella.training.settings import RunSettings, resolve
from lamella.training.tasks import task_of


@dataclass(frozen=True)
class Comparison:
    """Several methods on one task.

    Attributes:
        results: a row per method: method, task, metric, validation (mean over seeds), seed 0, seed 1, ... and mean on
            test, and interval, the 95 % bootstrap interval of that mean (None where the metric is no mean).
        cost: a row per method: trainable parameters, seconds per step, training seconds, peak memory, tokens.
        difference: test score of the first method minus the second, paired over examples and seeds.
        routing: the trace of the first routed run, as a frame.
        runs: every run by method, in the order of the seeds.
    """

    results: pd.DataFrame
    cost: pd.DataFrame
    difference: Interval | None
    routing: pd.DataFrame | None
    summary: str
    notes: list[str] = field(default_factory=list)
    runs: dict[str, list[RunResult]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The tables, the difference and every run's metrics as plain values, for JSON."""
        return {
            "summary": self.summary,
            "results": json.loads(self.results.to_json(orient="records")),
            "cost": json.loads(self.cost.to_json(orient="records")),
            "difference": None if self.difference is None else asdict(self.difference),
            "notes": self.notes,
            "runs": {name: [result.metrics for result in results] for name, results in self.runs.items()},
        }


def compare(
    arms: Mapping[str, RunSettings],
    seeds: Sequence[int],
    folder: Path,
    *,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    starting: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Train every arm with every seed, each run in its own folder, and put the scores side by side.

    A finished run of the same settings is taken as it is, an interrupted one goes on.

    Args:
        arms: settings by the name that tables show; the first is compared with the second. All on one task.
        seeds: each arm is run with each of them.
        folder: holds the folders of the runs.
        force: run again what is finished.
        callbacks: for the Trainer of every run.
        starting: told the name of each run before it starts.

    Raises:
        LamellaError: a run cannot be made, or its folder holds a run of other settings.
    """
    runs: dict[str, list[RunResult]] = {name: [] for name in arms}
    for seed in seeds:  # seed by seed, so that an early look already compares
        for name, settings in arms.items():
            chosen = settings.model_copy(update={"seed": seed})
            place = folder / f"{_slug(name)}-seed{seed}"
            starting(f"{name}, seed {seed}")
            runs[name].append(_run(chosen, place, force=force, callbacks=callbacks))
    settings = next(iter(arms.values()))
    task = task_of(settings)
    return _compared(task, runs, seeds)


def demo(*, quick: bool = False, threads: int | None = None) -> dict[str, RunSettings]:
    """The arms of the demo: MoLA and LoRA with as many trainable parameters, MiniLM on TREC.

    Args:
        quick: a few hundred rows, to see that everything works; its scores mean nothing.
        threads: CPU threads; torch's default if absent.
    """
    changes: dict[str, Any] = {"threads": threads}
    if quick:
        changes |= {"limit": {"train": 320, "validation": 100, "test": 200}}
    return {"MoLA 2-4-6-8": resolve("trec-mola", **changes), "LoRA": resolve("trec-lora", **changes)}


def _run(settings: RunSettings, folder: Path, *, force: bool, callbacks: Sequence[TrainerCallback]) -> RunResult:
    place = RunFolder(folder)
    if place.finished and not force:
        place.check_same(settings)
        return RunResult(place, place.metrics())
    return train(settings, folder, force=force, callbacks=callbacks)


def _compared(task: Task, runs: dict[str, list[RunResult]], seeds: Sequence[int]) -> Comparison:
    examples = [scores for results in runs.values() if (scores := _examples_of(results)) is not None]
    difference = paired_interval(examples[0], examples[1]) if len(examples) > 1 else None
    floor = _floor_row(task, seeds)
    rows = [_result_row(name, task, results, seeds) for name, results in runs.items()]
    notes = [_matched(name, results[0].metrics) for name, results in runs.items()]
    routed = next((results[0] for results in runs.values() if results[0].metrics["routing"]), None)
    return Comparison(
        results=pd.DataFrame(rows if floor is None else [floor, *rows]),
        cost=pd.DataFrame([_cost_row(name, results) for name, results in runs.items()]),
        difference=difference,
        routing=None if routed is None else pd.read_parquet(routed.folder.path / "trace.parquet"),
        summary=_summary(task, runs, difference, floor),
        notes=[note for note in notes if note] + list(task.notes),
        runs=runs,
    )


def _examples_of(results: Sequence[RunResult]) -> npt.NDArray[np.float64] | None:
    return example_scores(results[0].metrics["metric"], [result.folder.path for result in results])


def _result_row(name: str, task: Task, results: Sequence[RunResult], seeds: Sequence[int]) -> dict[str, Any]:
    metric = results[0].metrics["metric"]
    tests = [result.metrics["test"][metric] for result in results]
    examples = _examples_of(results)
    return {
        "method": name,
        "task": task.name,
        "metric": metric,
        "validation": float(np.mean([result.metrics["validation"][metric] for result in results])),
        **{f"seed {seed}": score for seed, score in zip(seeds, tests, strict=True)},
        "mean": float(np.mean(tests)),
        "interval": None if examples is None else interval_around(examples),
    }


def _floor_row(task: Task, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Scores of the linear model, which no seed changes; None for tasks without labels to predict from a text."""
    predictions = floor_predictions(task).get(FLOOR)
    if predictions is None:
        return None
    metric = metric_for(task.metric)
    labels = {split: np.asarray(task.splits[split]["label"]) for split in predictions}
    correct = (predictions["test"] == labels["test"]).astype(np.float64)
    test = metric.function(predictions["test"], labels["test"])
    return {
        "method": FLOOR,
        "task": task.name,
        "metric": metric.name,
        "validation": metric.function(predictions["validation"], labels["validation"]),
        **{f"seed {seed}": test for seed in seeds},
        "mean": test,
        "interval": interval_around(correct) if metric.name == "accuracy" else None,
    }


def _cost_row(name: str, results: Sequence[RunResult]) -> dict[str, Any]:
    measured = [result.metrics for result in results]
    return {
        "method": name,
        "trainable parameters": measured[0]["trainable_parameters"],
        "seconds per step": float(np.median([one["seconds_per_step"] for one in measured])),
        "training seconds": float(np.median([one["train_seconds"] for one in measured])),
        "peak memory MB": max(one["peak_memory_bytes"] for one in measured) / 1e6,
        "tokens": measured[0]["tokens"],
    }


def _matched(name: str, metrics: Mapping[str, Any]) -> str | None:
    if "matched_method" not in metrics:
        return None
    return (
        f"{name}: rank {metrics['rank']} was chosen, so that its {metrics['trainable_parameters']:,} trainable "
        f"parameters come nearest to the {metrics['matched_parameters']:,} of {metrics['matched_method']}."
    )


def _summary(
    task: Task, runs: Mapping[str, Sequence[RunResult]], difference: Interval | None, floor: Mapping[str, Any] | None
) -> str:
    metric = next(iter(runs.values()))[0].metrics["metric"]
    means = {name: np.mean([one.metrics["test"][metric] for one in results]) for name, results in runs.items()}
    count = len(next(iter(runs.values())))
    text = f"On {len(task.splits['test']):,} test rows of {task.name}, mean {metric} over {count} seed(s): "
    text += ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()) + "."
    if floor is not None:
        text += f" The linear floor reaches {floor['mean']:.3f}."
    if difference is not None:
        first, second = list(runs)[:2]
        surely = "excludes" if difference.low > 0 or difference.high < 0 else "includes"
        text += f" {first} minus {second}: {difference}, a 95 % paired interval that {surely} zero."
    return text


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
