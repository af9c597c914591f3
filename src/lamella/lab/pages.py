"""What runs and studies say in a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lamella.findings import Diagnosis
from lamella.lab.report.report import Report
from lamella.lab.report.tokens import TokenText, token_texts
from lamella.lab.robustness.comparison import Robustness
from lamella.lab.runs.by_task import BY_TASK
from lamella.lab.runs.callbacks import entropy_over_training
from lamella.lab.runs.card import public_name, task_name
from lamella.lab.runs.checks import diagnose
from lamella.lab.runs.controls import controls_sentences
from lamella.lab.runs.evaluating import Traced, trace
from lamella.lab.runs.floors import FLOOR
from lamella.lab.runs.folder import RunFolder
from lamella.lab.runs.plain_text import plain_text_sentence
from lamella.lab.runs.run import RunResult
from lamella.lab.runs.settings import RunSettings
from lamella.lab.runs.trained import redundancy_of
from lamella.lab.studies.choices import study_choices
from lamella.lab.studies.study import Study
from lamella.statistics import mean_intervals
from lamella.tracing import FIRST_COLUMNS

_MEASURED = (
    "Step time ratio, kept MB and latency were measured when the study was done, on the CPU with one thread and in "
    "interleaved rounds on the first rows of the task."
)
_SHOWN = 8  # rows of a study's page that are coloured token by token


def study_report(title: str, study: Study, costs: pd.DataFrame) -> Report:
    """The page of a study, whose runs the doctor has examined; of its first routed run some texts token by token."""
    routed = study.routed_runs
    traced = trace(first, split="validation", rows=_SHOWN, shown=_SHOWN) if (first := _first(routed)) else None
    return Report(
        title=title,
        summary=study.summary,
        results=study.results,
        cost=_shown_cost(study.cost.merge(costs, how="left")),
        routing=_over_methods({method: _routing(run) for method, run in routed.items()}),
        by_task=_by_task(routed),
        entropy=_entropy(routed),
        texts=() if traced is None else _texts(traced),
        redundancy=_redundancy(routed),
        choices=study_choices(study),
        settings=study.settings,
        notes=[*study.notes, *[_MEASURED] * (len(costs) > 0)],
        findings=study.findings,
        findings_checked=True,
        about=study,
    )


def _first(runs: Mapping[str, Path]) -> Path | None:
    return next(iter(runs.values()), None)


def _redundancy(runs: Mapping[str, Path]) -> pd.DataFrame | None:
    return _over_methods({method: redundancy_of(run) for method, run in runs.items()})


def _routing(run: Path) -> pd.DataFrame | None:
    return RunFolder(run).table("trace.parquet", *FIRST_COLUMNS)


def _by_task(runs: Mapping[str, Path]) -> pd.DataFrame | None:
    """The traces by task of runs on several tasks, with a column ``method``."""
    frames = {method: RunFolder(run).table(BY_TASK, *FIRST_COLUMNS, "task") for method, run in runs.items()}
    there = [frame.assign(method=method) for method, frame in frames.items() if frame is not None]
    return pd.concat(there, ignore_index=True) if there else None


def _of_all(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what is of one task among several."""
    return {name: value for name, value in metrics.items() if "/" not in name}


def _rows_by_task(method: str, run: RunFolder) -> list[dict[str, Any]]:
    """Accuracy on each of several tasks, with its interval; no rows of a run on one."""
    predictions = run.table("predictions.parquet", "split")
    if predictions is None or "task" not in predictions or "correct" not in predictions:
        return []
    rows = []
    for (split, task), own in predictions.groupby(["split", "task"], sort=False):
        right = own["correct"].to_numpy(float)
        interval = mean_intervals({method: {0: right}}).get(method)
        row = {"method": method, "task": task, "split": split, "accuracy": float(right.mean()), "interval": interval}
        rows.append(row)
    return rows


def _over_methods(frames: Mapping[str, pd.DataFrame | None]) -> pd.DataFrame | None:
    """One frame of all methods', which the name of the stack tells."""
    there = {method: frame for method, frame in frames.items() if frame is not None}
    named = [frame.assign(stack=method + ", " + frame["stack"].astype(str)) for method, frame in there.items()]
    return pd.concat(named, ignore_index=True) if named else None


def _entropy(runs: Mapping[str, Path]) -> pd.DataFrame | None:
    histories = {method: RunFolder(run).table("routing.parquet") for method, run in runs.items()}
    curves = [
        entropy_over_training(history).assign(run=method)
        for method, history in histories.items()
        if history is not None  # a run shorter than its logging interval has none
    ]
    return pd.concat(curves, ignore_index=True) if curves else None


def run_report(result: RunResult, settings: RunSettings) -> Report:
    """The page of a single run, examined by the doctor."""
    metrics = result.metrics
    scores = {split: metrics[split] for split in ("validation", "test") if split in metrics}
    name, main = metrics["method"], metrics["metric"]
    score = ", ".join(f"{values[main]:.3f} on {split}" for split, values in scores.items())
    floor = {split: {f"{main}, {FLOOR}": value} for split, value in metrics.get("floor", {}).items()}
    controls = metrics.get("controls", {})
    differences = controls.get("differences", {})
    rows = [
        {"method": name, "task": metrics["task"], "split": split, **_of_all(values), **floor.get(split, {})}
        | ({f"{name} less it": ""} if controls else {})
        for split, values in scores.items()
    ]
    rows += _rows_by_task(name, result.folder)
    before = [
        {"method": f"{name}, before training", "task": metrics["task"], "split": split, **_of_all(values)}
        for split, values in metrics.get("before", {}).items()
    ]
    beside = [
        {"method": control, "task": metrics["task"], "split": split, **_of_all(values), **floor.get(split, {})}
        | {f"{name} less it": _difference(differences.get(control)) if split == controls["split"] else ""}
        for control, by_split in controls.get("scores", {}).items()
        for split, values in by_split.items()
    ]
    model = public_name(metrics["model"])
    cost = {
        "method": name,
        "trainable parameters": metrics["trainable_parameters"],
        "seconds per step": metrics["seconds_per_step"],
        "training seconds": metrics["train_seconds"],
        "peak memory MB": metrics["peak_memory_bytes"] / 1e6,
        "tokens": metrics["tokens"],
    }
    return Report(
        title=f"{model} on {task_name(metrics['task'])} with {name}",
        summary=f"{model} with {name} reaches {main} {score} after {metrics['steps']} steps."
        + (f"\n{controls_sentences(controls)[0]}" if controls else ""),
        results=pd.DataFrame([*before, *rows, *beside]),
        cost=pd.DataFrame([cost]),
        routing=_routing(result.folder.path),
        by_task=_by_task({name: result.folder.path}),
        entropy=_entropy({name: result.folder.path}),
        settings=settings.model_dump(mode="json"),
        notes=[
            *filter(None, [metrics["summary"]]),
            *([plain_text_sentence(metrics["plain_text"])] if "plain_text" in metrics else []),
            *(controls_sentences(controls)[1:] if controls else []),
            *metrics["notes"],
        ],
        redundancy=redundancy_of(result.folder.path),
        findings=diagnose(result).findings,
        findings_checked=True,
        about=result,
    )


def _difference(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(one["difference"], *one["interval"])


def trace_report(traced: Traced, diagnosis: Diagnosis) -> Report:
    """The page of a model's routing on a task."""
    scored, routing = traced.evaluation, traced.summary
    name = traced.trained.place.label
    row = {"method": name, "task": scored.task, "split": scored.split, **_of_all(scored.metrics)}
    rows = [
        row,
        *(
            {"method": name, "task": one["task"], "split": scored.split, one["metric"]: one["value"]}
            | {"interval": one["interval"]}
            for one in scored.by_task
        ),
    ]
    return Report(
        title=f"Routing of {name} on {task_name(scored.task)}",
        summary=(
            f"On {scored.rows:,} {scored.split} rows of {task_name(scored.task)} it reaches {scored.metric} "
            f"{scored.metrics[scored.metric]:.3f}. Its routers' mean entropy is {routing['entropy']:.2f} nats, their "
            f"balance {routing['balance']:.2f} (1 is even), a decision counts by {routing['effective_experts']:.2f} "
            f"experts in the mean, and {routing['dead_experts']:.0f} expert(s) are nearly unused."
        ),
        results=pd.DataFrame(rows),
        cost=pd.DataFrame([{"method": name, "trainable parameters": traced.trained.size}]),
        routing=traced.frame,
        by_task=None if traced.by_task is None else traced.by_task.assign(method=name),
        settings={} if (settings := traced.trained.place.settings) is None else settings.model_dump(mode="json"),
        notes=scored.notes,
        texts=_texts(traced),
        redundancy=traced.trained.redundancy(),
        findings=diagnosis.findings,
        findings_checked=True,
        about=traced,
    )


def _texts(traced: Traced) -> list[TokenText]:
    """Some texts token by token; none where decisions are for whole sequences, as MoLEx's are."""
    return [] if traced.tokens.empty else token_texts(traced.tokens, traced.texts, traced.num_experts)


def _shown_cost(cost: pd.DataFrame) -> pd.DataFrame:
    """Without the task's and backbone's names where there is only one; step time is one over the reference's."""
    constant = [name for name in ("task", "backbone") if cost[name].nunique() == 1]
    return (
        cost.drop(columns=constant).dropna(axis="columns", how="all").rename(columns={"step time": "step time ratio"})
    )


def robustness_report(scored: Robustness) -> Report:
    """The page of models under noise."""
    kind = scored.noise
    results = scored.means.rename(columns=lambda strength: f"{kind.symbol} {strength:g}").reset_index()
    return Report(
        title=f"{task_name(scored.task)} under {kind.title}",
        summary=scored.summary,
        results=results,
        cost=pd.DataFrame([{"method": name, "trainable parameters": size} for name, size in scored.sizes.items()]),
        routing=None,
        settings={
            "noise": {"kind": kind.name, "protocol": kind.protocol, "seeds": scored.seeds},
            "rows": {"task": scored.task, "split": scored.split, "count": scored.rows, "metric": scored.metric},
        },
        notes=scored.notes,
        robustness=scored.frame,
        robustness_differences=scored.differences,
        about=scored,
    )
