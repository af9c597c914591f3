"""A run as one HTML page: the verdict, the results and their plot, cost, routing, settings and notes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from lamella.errors import LamellaError
from lamella.reporting.dots import dot_plots
from lamella.reporting.heatmap import BANDS, routing_view
from lamella.reporting.tables import frame_table, settings_sections


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        title: the page's title.
        summary: the answer in words with its numbers, one paragraph.
        results: a row per method (and task): first column "method", then any columns. The plot reads "task", "metric",
            "mean", "seed 0", "seed 1", ... and "interval", a (low, high) pair around the mean; a method whose name
            holds the word "floor" is drawn as a line. A missing cell says "not run".
        cost: a row per method: first column "method", then trainable parameters, seconds per step, peak memory MB, ...
        routing: the frame of a trace, a row per layer × module × expert: stack, layer, module, expert, num_experts,
            share (sums to 1 over a router's experts), mean_weight, entropy (nats), tokens. None: nothing was traced.
        settings: what the run was given, nested.
        notes: what was skipped, adjusted or not run.
    """

    title: str
    summary: str
    results: pd.DataFrame
    cost: pd.DataFrame
    routing: pd.DataFrame | None
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()


def render(report: Report) -> str:
    """The whole page: no script and nothing loaded from elsewhere, every text of the report escaped.

    Raises:
        LamellaError: a table lacks a column it must have.
    """
    # Autoescaping holds for every template, and no value is ever marked as safe.
    pages = Environment(
        loader=PackageLoader("lamella.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("report.html.j2").render(
        report=report,
        results=frame_table(report.results, "Scores, a row per method", missing="not run"),
        plots=dot_plots(report.results),
        cost=frame_table(report.cost, "What each method needs, a row per method", missing="not measured"),
        routing=None if report.routing is None else routing_view(report.routing),
        bands=BANDS,
        sections=settings_sections(report.settings),
    )


def write_report(report: Report, path: Path) -> Path:
    """Write the page to `path`, whole or not at all, making its folder where there is none; return `path`.

    Raises:
        LamellaError: the page cannot be made, or the file cannot be written.
    """
    page = render(report)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(page, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise LamellaError(
            f"The report cannot be written to {path}: {reason}. Name a file in a folder you may write to."
        ) from error
    return path
