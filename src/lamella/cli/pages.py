"""What runs and studies say in a report."""

from __future__ import annotations

import pandas as pd

from lamella.diagnostics.doctor import Diagnosis, doctor
from lamella.lab.report.report import Report
from lamella.lab.report.tokens import token_texts
from lamella.lab.robustness.robustness import Robustness
from lamella.lab.runs.callbacks import entropy_over_training
from lamella.lab.runs.evaluating import Traced, trace
from lamella.lab.runs.run import RunResult
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.trained import load_trained
from lamella.lab.studies.composition.study import ComposedStudy
from lamella.lab.studies.study import Study

_MEASURED = (
    "Step time ratio, kept MB and latency were measured when the study was done, on the CPU with one thread and in "
    "interleaved rounds on the first rows of the task."
)
_SHOWN = 8  # rows of a study's page that are coloured token by token


def study_report(title: str, study: Study, costs: pd.DataFrame) -> Report:
    """The page of a study, whose runs the doctor has examined; of its first routed run some texts token by token."""
    traced = None if study.routed is None else trace(study.routed, split="validation", rows=_SHOWN, shown=_SHOWN)
    return Report(
        title=title,
        summary=study.summary,
        results=study.results,
        cost=_shown_cost(study.cost.merge(costs, how="left")),
        routing=study.routing,
        entropy=study.entropy,
        texts=()
        if traced is None or traced.tokens.empty
        else token_texts(traced.tokens, traced.texts, traced.num_experts),
        redundancy=study.redundancy,
        choices=study.choices,
        settings=study.settings,
        notes=[*study.notes, *[_MEASURED] * (len(costs) > 0)],
        findings=study.findings,
        findings_checked=True,
    )


def composition_report(title: str, study: ComposedStudy) -> Report:
    """The page of a study of composition: the tests that its verdict speaks of."""
    return Report(
        title=title,
        summary=study.summary,
        results=study.results[study.results["task"].isin(study.headline)],
        cost=study.cost,
        routing=None,
        settings=study.settings,
        notes=study.notes,
        findings=study.findings,
        findings_checked=True,
    )


def run_report(result: RunResult, settings: RunSettings) -> Report:
    """The page of a single run, examined by the doctor."""
    metrics = result.metrics
    scores = {split: metrics[split] for split in ("validation", "test") if split in metrics}
    name, main = metrics["method"], metrics["metric"]
    score = ", ".join(f"{values[main]:.3f} on {split}" for split, values in scores.items())
    routing, history = (result.folder.path / name for name in ("trace.parquet", "routing.parquet"))
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
        routing=pd.read_parquet(routing) if routing.is_file() else None,
        entropy=entropy_over_training(pd.read_parquet(history)).assign(run=name) if history.is_file() else None,
        settings=settings.model_dump(mode="json"),
        notes=[*filter(None, [metrics["summary"]]), *metrics["notes"]],
        redundancy=load_trained(result.folder.path).redundancy() if metrics["routing"] else None,
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
        redundancy=traced.trained.redundancy(),
        findings=diagnosis.findings,
        findings_checked=True,
    )


def _shown_cost(cost: pd.DataFrame) -> pd.DataFrame:
    """Without the task's and backbone's names where there is only one; step time is one over the reference's."""
    constant = [name for name in ("task", "backbone") if cost[name].nunique() == 1]
    return cost.drop(columns=constant).rename(columns={"step time": "step time ratio"})


def robustness_report(found: Robustness) -> Report:
    """The page of models under noise."""
    kind = found.noise
    results = found.means.rename(columns=lambda strength: f"{kind.symbol} {strength:g}").reset_index()
    return Report(
        title=f"{found.task} under {kind.title}",
        summary=found.summary,
        results=results,
        cost=pd.DataFrame([{"method": name, "trainable parameters": size} for name, size in found.sizes.items()]),
        routing=None,
        settings={
            "noise": {"kind": kind.name, "protocol": kind.protocol, "seeds": found.seeds},
            "rows": {"task": found.task, "split": found.split, "count": found.rows, "metric": found.metric},
        },
        notes=found.notes,
        robustness=found.frame,
        robustness_differences=found.differences,
    )
