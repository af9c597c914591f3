"""A run as one HTML page: verdict, results, cost, routing and what else was recorded, findings, settings, notes."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from lamella.errors import LamellaError
from lamella.files import write_whole
from lamella.lab.report.dots import dot_plots
from lamella.lab.report.findings import Finding, findings_words, worst_first
from lamella.lab.report.heatmap import BANDS, routing_view
from lamella.lab.report.pages import page_environment
from lamella.lab.report.pictures import PictureGrid, picture_view
from lamella.lab.report.redundancy import redundancy_view
from lamella.lab.report.robustness import robustness_view
from lamella.lab.report.tables import Table, frame_table, settings_sections
from lamella.lab.report.tokens import TokenText
from lamella.lab.report.tokenview import token_view
from lamella.lab.report.training import training_charts

_ABSENT = {
    "training": "entropy over training",
    "texts": "texts coloured token by token",
    "redundancy": "redundancy per layer",
}

_FIRST = ("method", "task", "metric", "mean", "interval", "difference", "p")


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
        entropy: the routers' entropy over training: run, step, entropy (share of its maximum, 0..1), and where logged
            balance and dead_experts.
        texts: texts to colour token by token; `token_texts` makes them from a trace.
        redundancy: how far apart a layer's experts are: stack, layer, module, raw and normalised (mean over pairs of
            the Frobenius distance between their deltas).
        robustness: scores under noise: method, noise, strength, seed, metric, value.
        robustness_differences: the same methods compared: method, against, strength, measure, difference, low, high, p.
        choices: what MoLEx chose for which texts: tables by caption, first column "method".
        pictures: what was drawn from which prompts.
        findings: what the doctor found.
        findings_checked: whether the doctor looked, so that no finding means a healthy run.
    """

    title: str
    summary: str
    results: pd.DataFrame
    cost: pd.DataFrame
    routing: pd.DataFrame | None
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    entropy: pd.DataFrame | None = None
    texts: Sequence[TokenText] = ()
    redundancy: pd.DataFrame | None = None
    robustness: pd.DataFrame | None = None
    robustness_differences: pd.DataFrame | None = None
    choices: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    pictures: PictureGrid | None = None
    findings: Sequence[Finding] = ()
    findings_checked: bool = False


def render(report: Report) -> str:
    """The whole page: nothing loaded from elsewhere, every text of the report escaped, and no script but our own.

    Raises:
        LamellaError: a table lacks a column it must have, or weights do not fit their tokens.
    """
    pages = page_environment()
    parts = {
        "pictures": None if report.pictures is None else picture_view(report.pictures),
        "routing": None if report.routing is None else routing_view(report.routing),
        "training": () if report.entropy is None else training_charts(report.entropy),
        "texts": token_view(report.texts),
        "redundancy": None if report.redundancy is None else redundancy_view(report.redundancy),
        "choices": [frame_table(frame, caption, missing="none") for caption, frame in report.choices.items()],
        "robustness": (
            None if report.robustness is None else robustness_view(report.robustness, report.robustness_differences)
        ),
    }
    return pages.get_template("report.html.j2").render(
        report=report,
        results=_results_table(report.results),
        plots=dot_plots(report.results),
        cost=frame_table(report.cost, "What each method needs, a row per method", missing="not measured"),
        bands=BANDS,
        found=worst_first(report.findings),
        findings_words=findings_words(report.findings, report.findings_checked),
        sections=settings_sections(report.settings),
        contents=_contents(report, parts),
        absent=[words for name, words in _ABSENT.items() if not parts[name]],
        policy=_policy(pages, bool(parts["texts"]), bool(parts["pictures"])),
        **parts,
    )


def _results_table(results: pd.DataFrame) -> Table:
    """What matters most comes first, and what is the same in every row is said once: a narrow screen shows the left."""
    alike = [name for name in ("task", "metric") if name in results.columns and results[name].nunique() == 1]
    words = "".join(f", {name} {results[name].iloc[0]}" for name in alike)
    first = [name for name in _FIRST if name in results.columns]
    ordered = results[[*first, *[name for name in results.columns if name not in first]]]
    return frame_table(ordered.drop(columns=alike), f"Scores{words}, a row per method", missing="not run")


def _contents(report: Report, parts: Mapping[str, Any]) -> list[str]:
    """The headings of the sections below the verdict, in the page's order."""
    shown = [name for name in ("choices", "robustness", "training", "texts", "redundancy") if parts[name]]
    middle = ["Tokens" if name == "texts" else name.capitalize() for name in shown]
    pictures = ["Pictures"] * bool(parts["pictures"])
    return ["Results", *pictures, "Cost", "Routing", *middle, "Findings", "Settings", *["Notes"] * bool(report.notes)]


def _policy(pages: Environment, with_script: bool, with_pictures: bool) -> str:
    """The content security policy: nothing is loaded, and only the script with this very text runs.

    Pictures are in the page itself, so that a source of another kind stays forbidden.
    """
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
    policy += "; img-src data:" if with_pictures else ""
    if not with_script:
        return policy
    digest = hashlib.sha256(pages.get_template("tokens.js").render().encode()).digest()
    return f"{policy}; script-src 'sha256-{base64.b64encode(digest).decode()}'"


def write_report(report: Report, path: Path) -> Path:
    """Write the page to `path`, whole or not at all, making its folder where there is none; return `path`.

    Raises:
        LamellaError: the page cannot be made, or the file cannot be written.
    """
    page = render(report)
    try:
        write_whole(path, page)
    except OSError as error:
        reason = error.strerror or error
        raise LamellaError(
            f"The report cannot be written to {path}: {reason}. Name a file in a folder you may write to."
        ) from error
    return path
