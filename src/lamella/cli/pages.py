"""What runs and comparisons say in a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd

from lamella.reporting.report import Report
from lamella.reporting.tokens import token_texts
from lamella.training.comparison import Comparison
from lamella.training.doctor import Diagnosis, doctor
from lamella.training.evaluating import Traced
from lamella.training.run import RunResult
from lamella.training.settings import RunSettings
from lamella.training.study import Study
from lamella.training.trained import load_trained
from lamella.tuners import redundancy


def comparison_report(title: str, comparison: Comparison, arms: Mapping[str, RunSettings]) -> Report:
    """The page of a comparison, with every run examined by the doctor."""
    places = {
        f"{name}, seed {run.metrics['seed']}": run for name, results in comparison.runs.items() for run in results
    }
    return Report(
        title=title,
        summary=comparison.summary,
        results=comparison.results,
        cost=comparison.cost,
        routing=comparison.routing,
        settings={name: settings.model_dump(mode="json") for name, settings in arms.items()},
        notes=comparison.notes,
        redundancy=_redundancy(places.values()),
        findings=[
            replace(finding, where=f"{name}: {finding.where}")
            for name, run in places.items()
            for finding in doctor(run.folder.path).findings
        ],
        findings_checked=True,
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
    """The page of a single run, examined by the doctor."""
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
        redundancy=_redundancy([result]),
        findings=doctor(result.folder.path).findings,
        findings_checked=True,
    )


def trace_report(traced: Traced, diagnosis: Diagnosis) -> Report:
    """The page of a model's routing on a task."""
    found, routing = traced.evaluation, traced.summary
    name = traced.trained.place.label
    row = {"method": name, "task": found.task, "split": found.split, **found.metrics}
    return Report(
        title=f"Routing of {name} on {found.task}",
        summary=(
            f"On {found.rows:,} {found.split} rows of {found.task} it reaches {found.metric} "
            f"{found.metrics[found.metric]:.3f}. Its routers' mean entropy is {routing['entropy']:.2f} nats, their "
            f"balance {routing['balance']:.2f} (1 is even), and {routing['dead_experts']:.0f} expert(s) are nearly "
            "unused."
        ),
        results=pd.DataFrame([row]),
        cost=pd.DataFrame([{"method": name, "trainable parameters": traced.trained.size}]),
        routing=traced.frame,
        settings={} if (own := traced.trained.place.settings) is None else own.model_dump(mode="json"),
        notes=found.notes,
        texts=token_texts(traced.tokens, traced.texts, traced.num_experts),
        redundancy=redundancy(traced.trained.model),
        findings=diagnosis.findings,
        findings_checked=True,
    )


def _redundancy(runs: Iterable[RunResult]) -> pd.DataFrame | None:
    """Of the first run with routers, whose routing the page shows."""
    routed = next((run for run in runs if run.metrics["routing"]), None)
    return None if routed is None else redundancy(load_trained(routed.folder.path).model)
