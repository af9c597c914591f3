"""A run as one HTML page: summary, results, cost, the registered sections, findings, settings, notes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lamella.errors import LamellaError
from lamella.files import write_atomic
from lamella.findings import Finding
from lamella.lab.report.dots import dot_plots
from lamella.lab.report.findings import findings_words, worst_first
from lamella.lab.report.pages import page_environment
from lamella.lab.report.pictures import PictureGrid
from lamella.lab.report.sections import Section, sections_of
from lamella.lab.report.tables import Table, frame_table, settings_sections
from lamella.lab.report.tokens import TokenText

_FIRST = ("method", "task", "metric", "mean", "interval", "difference", "p")


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        title: the page's title.
        summary: the answer in words with its numbers, a line for each paragraph.
        results: a row per method (and task): first column "method", then any columns. The plot reads "task", "metric",
            "mean", "seed 0", "seed 1", ... and "interval", a (low, high) pair around the mean; a method whose name
            holds the word "floor" is drawn as a line. A missing cell says "not run".
        cost: a row per method: first column "method", then trainable parameters, seconds per step, peak memory MB, ...
        routing: the frame of a trace, a row per layer × module × expert: stack, layer, module, expert, num_experts,
            share (sums to 1 over a router's experts), mean_weight, entropy (nats), tokens. None: nothing was traced.
        settings: what the run was given, nested.
        notes: what was skipped, adjusted or not run.
        by_task: of several tasks, that frame of each, with the columns method and task.
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
        about: the study, run or trace itself, for sections that read it.
    """

    title: str
    summary: str
    results: pd.DataFrame
    cost: pd.DataFrame
    routing: pd.DataFrame | None
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    by_task: pd.DataFrame | None = None
    entropy: pd.DataFrame | None = None
    texts: Sequence[TokenText] = ()
    redundancy: pd.DataFrame | None = None
    robustness: pd.DataFrame | None = None
    robustness_differences: pd.DataFrame | None = None
    choices: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    pictures: PictureGrid | None = None
    findings: Sequence[Finding] = ()
    findings_checked: bool = False
    about: object = None


def render(report: Report) -> str:
    """The complete page: nothing loaded from elsewhere, every text of the report escaped, and no script but our own.

    Raises:
        LamellaError: a table lacks a column it must have, or weights do not fit their tokens.
    """
    sections, absent = sections_of(report)
    template = page_environment().get_template("report.html.j2")
    return template.render(
        report=report,
        results=_results_table(report.results),
        plots=dot_plots(report.results),
        cost=frame_table(report.cost, "What each method needs, a row per method", missing="not measured"),
        findings_in_order=worst_first(report.findings),
        findings_words=findings_words(report.findings, report.findings_checked),
        settings=settings_sections(report.settings),
        sections=sections,
        contents=_contents(report, sections),
        absent=absent,
        policy=_policy(sections),
    )


def _results_table(results: pd.DataFrame) -> Table:
    """What matters most comes first, and what is the same in every row is said once: a narrow screen shows the left."""
    alike = [name for name in ("task", "metric") if name in results.columns and results[name].nunique() == 1]
    words = "".join(f", {name} {results[name].iloc[0]}" for name in alike)
    first = [name for name in _FIRST if name in results.columns]
    ordered = results[[*first, *[name for name in results.columns if name not in first]]]
    return frame_table(ordered.drop(columns=alike), f"Scores{words}, a row per method", missing="not run")


def _contents(report: Report, sections: Sequence[Section]) -> list[tuple[str, str]]:
    """Headings below the summary with what links point at, in the page's order."""
    fixed = ["Findings", "Settings", *["Notes"] * bool(report.notes)]
    ends = [[(name.lower(), name) for name in names] for names in (["Results", "Cost"], fixed)]
    return [*ends[0], *((one.anchor, one.title) for one in sections), *ends[1]]


def _policy(sections: Sequence[Section]) -> str:
    """The content security policy: nothing is loaded, and only the sections' scripts with their very text run.

    Pictures are in the page itself, so that a source of another kind stays forbidden.
    """
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
    if any(one.registered.pictures for one in sections):
        policy += "; img-src data:"
    scripts = [one.registered.script for one in sections if one.registered.script is not None]
    if not scripts:
        return policy
    texts = [page_environment().get_template(name).render() for name in scripts]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"{policy}; script-src {allowed}"


def write_report(report: Report, path: Path) -> Path:
    """Write the page to `path`, whole or not at all, making its folder where there is none; return `path`.

    Raises:
        LamellaError: the page cannot be made, or the file cannot be written.
    """
    page = render(report)
    try:
        write_atomic(path, page)
    except OSError as error:
        reason = error.strerror or error
        raise LamellaError(
            f"The report cannot be written to {path}: {reason}. Name a file in a folder you may write to."
        ) from error
    return path
