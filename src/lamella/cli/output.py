"""What commands show: JSON for programs, a progress bar and tables for people."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from lamella.lab.robustness.comparison import Robustness
    from lamella.lab.runs.evaluating import Evaluation

# People read standard error while a program reads standard output. What is shown is text, never markup: names of
# methods and paths may hold brackets.
console = Console(stderr=True, markup=False, emoji=False, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output; what is not a finite number, such as a median of nothing, is null."""
    json.dump(_finite(value), sys.stdout, allow_nan=False)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_results(results: pd.DataFrame, cost: pd.DataFrame, summary: str) -> None:
    """A row per method with its scores and costs, and the answer in words; the report has the rest."""
    table = Table(title="test scores, with 95 % intervals", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    several = results["task"].nunique() > 1
    for column in ["method", *["task"] * several]:
        table.add_column(column)
    for column in ("mean", "interval", "difference", "p", "size", "step"):
        table.add_column(column, justify="right", no_wrap=True)
    costs = {row["method"]: row for row in cost.to_dict("records")}
    for row in results.to_dict("records"):
        cost_of = {} if several else costs.get(row["method"], {})
        table.add_row(
            row["method"],
            *[row["task"]] * several,
            *(_cell(row.get(column)) for column in ("mean", "interval", "difference", "p")),
            _count(cost_of.get("trainable parameters")),
            _times(cost_of.get("step time")),
        )
    console.print(table)
    console.print(summary)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f}-{value[1]:.3f}"
    return value if isinstance(value, str) else _number(value)


def _count(value: float | None) -> str:
    """At most three digits: 884k, 1.76M."""
    if value is None or math.isnan(value):
        return ""
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= size), (1, ""))
    return f"{value / size:.3g}{unit}"


def _times(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}x"


def show_run(metrics: Mapping[str, Any], folder: Path) -> None:
    """A run's scores, its size and where it lies."""
    table = Table(title=f"{metrics['method']} on {metrics['task']}", title_justify="left")
    splits = {f"{split} before": scores for split, scores in metrics.get("before", {}).items()}
    splits |= {split: metrics[split] for split in ("validation", "test") if split in metrics}
    table.add_column("split")
    names = [name for name in next(iter(splits.values()), {}) if "/" not in name]
    for name in names:
        table.add_column(name, justify="right")
    if floor := metrics.get("floor", {}):
        from lamella.lab.runs.floors import FLOOR

        table.add_column(f"{metrics['metric']}, {FLOOR}", justify="right")
    for split, scores in splits.items():
        beside = [_number(floor.get(split))] if floor else []
        table.add_row(split, *(_number(scores[name]) for name in names), *beside)
    console.print(table)
    for split, scores in splits.items():
        main = f"/{metrics.get('metric')}"
        if by_task := [f"{name} {_number(value)}" for name, value in scores.items() if name.endswith(main)]:
            console.print(f"{split}: {', '.join(by_task)}")
    if "controls" in metrics:
        _show_controls(metrics["controls"], splits, metrics["metric"])
    if metrics["summary"]:
        console.print(metrics["summary"])
    if "plain_text" in metrics:
        from lamella.lab.runs.plain_text import plain_text_sentence

        console.print(plain_text_sentence(metrics["plain_text"]))
    console.print(
        f"{metrics['trainable_parameters']:,} trainable parameters, {metrics['seconds_per_step']:.2f} s per step, "
        f"{metrics['steps']} steps. The run is in {folder}"
    )


def _show_controls(controls: Mapping[str, Any], splits: Mapping[str, Any], metric: str) -> None:
    """The composition's score above those of what it has to beat, and what follows."""
    from lamella.lab.runs.controls import COMPOSITION, controls_sentences

    split, differences = controls["split"], controls["differences"]
    table = Table(title=f"what it has to beat: {metric}", title_justify="left")
    table.add_column("")
    scored = list(next(iter(controls["scores"].values())))
    for column in (*scored, f"the composition less it, {controls['measure']} on {split}"):
        table.add_column(column, justify="right")
    table.add_row(COMPOSITION, *(_number(splits[one][metric]) for one in scored))
    for name, of in controls["scores"].items():
        words = ""
        if one := differences.get(name):
            low, high = one["interval"]
            words = f"{one['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        table.add_row(name, *(_number(of[split][metric]) for split in scored), words)
    console.print(table)
    for sentence in controls_sentences(controls):
        console.print(sentence)


def show_scores(scored: Evaluation) -> None:
    """The scores of a model on a split of a task."""
    print(f"{scored.task}, {scored.rows:,} {scored.split} rows")
    tasks = [one["task"] for one in scored.by_task]
    for name, value in scored.metrics.items():
        if name.rpartition("/")[0] not in tasks:
            print(f"{name:<12} {value:.4f}{'  (the metric of the task)' if name == scored.metric else ''}")
    for one in scored.by_task:
        interval = "" if one["interval"] is None else "  [{:.4f}, {:.4f}]".format(*one["interval"])
        print(f"{one['task']}: {one['metric']} {one['value']:.4f}{interval}, {one['rows']:,} rows")
    if scored.unseen is not None:
        print(f"on the {scored.rows - (scored.trained_on or 0):,} rows that were not trained on:")
        for name, value in scored.unseen.items():
            print(f"{name:<12} {value:.4f}")
    for note in scored.notes:
        print(f"note: {note}")


def show_noise(measured: Robustness) -> None:
    """A row per strength and method with its mean and how it differs from the first, and the answer in words."""
    title = f"{measured.task} under {measured.noise.title}, mean of {measured.seeds} seed(s)"
    table = Table(title=title, title_justify="left")
    for column in (measured.noise.symbol, "method", measured.metric, "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "method" else "right")
    differences = {(one.method, one.strength): one for one in measured.differences.itertuples()}
    for strength, means in measured.means.items():
        for method, value in means.items():
            one = differences.get((method, strength))
            words = ("", "") if one is None else (f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}")
            table.add_row(f"{strength:g}", method, f"{value:.3f}", *words)
        table.add_section()
    console.print(table)
    print(measured.summary)
    for note in measured.notes:
        print(f"note: {note}")


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
