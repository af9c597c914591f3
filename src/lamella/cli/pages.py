"""What runs and comparisons say in a report."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lamella.reporting.report import Report
from lamella.training.comparison import Comparison
from lamella.training.run import RunResult
from lamella.training.settings import RunSettings
from lamella.training.study import Study


def comparison_report(title: str, comparison: Comparison, arms: Mapping[str, RunSettings]) -> Report:
    """The page of a comparison."""
    return Report(
        title=title,
        summary=comparison.summary,
        results=comparison.results,
        cost=comparison.cost,
        routing=comparison.routing,
        settings={name: settings.model_dump(mode="json") for name, settings in arms.items()},
        notes=comparison.notes,
    )


def study_report(title: str, study: Study) -> Report:
    """The page of a study."""
    return Report(
        title=title,
        summary=study.summary,
        results=study.results,
        cost=study.cost,
        routing=study.routing,
        settings=study.settings,
        notes=study.notes,
    )


def run_report(result: RunResult, settings: RunSettings) -> Report:
    """The page of a single run."""
    metrics = result.metrics
    scores = {split: metrics[split] for split in ("validation", "test") if split in metrics}
    name, main = metrics["method"], metrics["metric"]
    score = ", ".join(f"{values[main]:.3f} on {split}" for split, values in scores.items())
    trace = result.folder.path / "trace.parquet"
    rows = [{"method": name, "task": metrics["task"], "split": split, **values} for split, values in scores.items()]
    before = [
        {"method": f"{name}, before training", "task": metrics["task"], "split": split, **values}
        for split, values in metrics.get("before", {}).items()
    ]
    cost = {
        "method": name,
        "trainable parameters": metrics["trainable_parameters"],
        "seconds per step": metrics["seconds_per_step"],
        "training seconds": metrics["train_seconds"],
        "peak memory MB": metrics["peak_memory_bytes"] / 1e6,
        "tokens": metrics["tokens"],
    }
    return Report(
        title=f"{metrics['model']} on {metrics['task']} with {name}",
        summary=f"{metrics['model']} with {name} reaches {main} {score} after {metrics['steps']} steps.",
        results=pd.DataFrame([*before, *rows]),
        cost=pd.DataFrame([cost]),
        routing=pd.read_parquet(trace) if trace.is_file() else None,
        settings=settings.model_dump(mode="json"),
        notes=[*filter(None, [metrics["summary"]]), *metrics["notes"]],
    )
