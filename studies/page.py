"""The page of one kept study: what it asks, what it answers, and its tables."""

from __future__ import annotations

from lamella.lab.studies.composition_results import masking_table, remarks
from lamella.lab.studies.results import Results
from lamella.statistics import Contrast
from studies.answers import answers, sizes
from studies.keep import KeptStudy, purpose
from studies.tables import interval, markdown, number, p_value


def study_page(study: KeptStudy) -> str:
    """Docs/evidence/NAME.md, as Markdown."""
    parts = [f"# {study.name}", purpose(study.name), f"{study.run} of {study.planned} cells run."]
    parts += [f"On {machine}." for machine in study.machines]
    parts.append(answers(study))
    parts += remarks(study.tables) if "interference" in study.tables else []
    if "masked" in study.tables:
        parts.append(markdown(*masking_table(study.tables["masked"], study.tables["examples"])))
    for results in study.results:
        if results.run:
            parts += [f"## {results.title} with {results.backbone}", _table(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(results: Results) -> str:
    heads = ["method", "run", *(f"seed {seed}" for seed in results.seeds), "mean", f"minus {results.reference}", "p"]
    seeds = len(results.seeds)
    rows = [
        [f"floor ({word})", "", *[number(splits["test"])] * (seeds + 1), "", "", ""]
        for word, splits in results.floors.items()
    ]
    differences = {one.first: one for one in results.against_reference}
    trained = sizes(results)
    rows += [[*_row(results, name, differences.get(name)), f"{trained[name]:,}"] for name in results.means]
    missing = [name for name in results.names if name not in results.means]
    parts = [f"Test {results.metric}.", markdown([*heads, "trainable"], rows)]
    return "\n\n".join([*parts, *[f"Not run: {', '.join(missing)}."] * bool(missing)])


def _row(results: Results, name: str, contrast: Contrast | None) -> list[str]:
    values = results.values[name]
    seeds = [number(values[seed]) if seed in values else "" for seed in results.seeds]
    difference, p = ("reference" if name == results.reference else "", "")
    if contrast is not None:
        difference, p = interval(contrast), p_value(contrast.p_value)
    return [name, f"{len(values)} / {len(results.seeds)}", *seeds, number(results.means[name]), difference, p]
