"""A study of composition as a whole: its tables, written and at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lamella.files import whole, write_whole
from lamella.findings import Finding
from lamella.lab.evidence.evidence import RESAMPLES, Contrast, Standing
from lamella.lab.methods import Method
from lamella.lab.studies.composition.grid import HEAD, JOINT, LOSS, CompositionGrid, Stages
from lamella.lab.studies.composition.masking import masking_words
from lamella.lab.studies.composition.running import CompositionFolder
from lamella.lab.studies.composition.tables import (
    FLOORS,
    KL,
    METRICS,
    MIXTURE,
    PERPLEXITY,
    interference_rows,
    masked_rows,
    score_rows,
)
from lamella.statistics import paired_interval

_KEPT = ", what is kept"


@dataclass(frozen=True)
class ComposedStudy:
    """What a study of composition says.

    Attributes:
        summary: the verdict in words.
        headline: the tests that it speaks of.
        results: a row per test, metric and arm: a column per seed, mean, interval, difference from the reference, p.
        cost: a row per arm: trainable parameters, and median seconds to build and train it.
        findings: what the doctor found in the trained runs, the run's label before where it is.
        settings: the recipe, and where the runs lie.
        notes: how the numbers were made, and what is kept of each LoRA.
        not_run: labels of the cells without a row.
    """

    summary: str
    headline: tuple[str, ...]
    results: pd.DataFrame
    cost: pd.DataFrame
    findings: list[Finding]
    settings: Mapping[str, Any]
    notes: list[str]
    not_run: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The tables and words as plain values, for JSON."""
        return {
            "summary": self.summary,
            **{name: json.loads(getattr(self, name).to_json(orient="records")) for name in ("results", "cost")},
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
            "not_run": self.not_run,
        }


def summarise_composition(name: str, grid: CompositionGrid, stages: Stages, folder: CompositionFolder) -> ComposedStudy:
    """Write the study's tables, as Parquet, and ``study.yaml``; make what is said of them.

    Raises:
        LamellaError: a task cannot be loaded.
    """
    cells = stages.all
    rows, examples = score_rows(grid, cells, folder)
    pairs = interference_rows(grid, cells, folder)
    masked = masked_rows(grid, cells, folder)
    tables = {"results": rows, "examples": examples, "interference": pairs, "masked": masked}
    for file in tables_of(grid):
        with whole(folder.path / f"{file}.parquet") as unfinished:
            tables[file].to_parquet(unfinished, index=False)
    recipe = grid.model_dump(mode="json")
    write_whole(folder.path / "study.yaml", yaml.safe_dump(recipe, sort_keys=False))
    methods = {cell.method: cell.settings.method for cell in cells if cell.seed == grid.seed_list[0]}
    found = standings(name, grid, methods, rows, examples)
    failed = [f"Not run: {cell.label}. {folder.failure(cell.key) or ''}".strip() for cell in cells]
    return ComposedStudy(
        summary=" ".join(_words(one) for one in found if one.task not in grid.sources),
        headline=tuple(one.task for one in found if one.task not in grid.sources),
        results=pd.concat([_results(one) for one in found], ignore_index=True),
        cost=_cost(grid, rows),
        findings=_findings(stages, folder),
        settings={
            "study": recipe,
            "runs": {cell.label: f"runs/{cell.key}" for cell in cells if folder.finished(cell.key)},
        },
        notes=[
            *_notes(grid),
            *_unexamined(stages, folder),
            *interference_words(pairs),
            *perplexity_words(rows),
            *masking_words(masked, examples),
            *[line for line, cell in zip(failed, cells, strict=True) if not folder.answered(cell.key)],
        ],
        not_run=[cell.label for cell in cells if not folder.answered(cell.key)],
    )


def tables_of(grid: CompositionGrid) -> tuple[str, ...]:
    """The tables that a study has, by the names of their files."""
    return ("results", "examples", "interference", *(["masked"] if grid.masked else []))


def standings(
    name: str, grid: CompositionGrid, methods: Mapping[str, Method], rows: pd.DataFrame, examples: pd.DataFrame
) -> list[Standing]:
    """The score on the mixture, every source and every held-out test; then what is kept on the mixture, as a KL."""
    places = [(test, grid.metric) for test in (MIXTURE, *grid.held_out, *grid.sources)]
    return [_standing(name, grid, methods, rows, examples, *place) for place in [*places, (MIXTURE, KL)]]


def kept(standing: Standing) -> bool:
    """Whether a standing is about what is kept of each LoRA, not about scores."""
    return standing.task.endswith(_KEPT)


def _standing(
    name: str,
    grid: CompositionGrid,
    methods: Mapping[str, Method],
    rows: pd.DataFrame,
    examples: pd.DataFrame,
    test: str,
    metric: str,
) -> Standing:
    here = [frame[(frame["task"] == test) & (frame["metric"] == metric)] for frame in (rows, examples)]
    done = here[0][here[0]["status"] == "done"]
    tests: dict[str, dict[int, float]] = {arm: {} for arm in grid.names}
    scores: dict[str, dict[int, Any]] = {arm: {} for arm in grid.names}
    for row in done.itertuples():
        tests[row.method][row.seed] = row.value
    for one in here[1].itertuples():
        scores[one.method][one.seed] = np.asarray(one.scores, np.float64)
    floors = {word: done[f"floor_{word}"].iloc[0] for word in FLOORS if len(done) and f"floor_{word}" in done}
    return Standing(
        study=name,
        backbone=grid.backbone,
        task=f"{test}{_KEPT}" if metric == KL else test,
        methods={arm: methods[arm] for arm in grid.names},
        seeds=grid.seed_list,
        reference=grid.reference_name,
        metric=metric if len(done) else None,
        greater_is_better=METRICS[metric],
        tests=tests,
        examples=scores,
        sizes={row.method: int(row.trainable_parameters) for row in done.itertuples()},
        costs={},
        alphas={},
        entropies=_entropies(done),
        floors={word: value for word, value in floors.items() if not pd.isna(value)},
        noise=pd.DataFrame(),
    )


def _entropies(done: pd.DataFrame) -> dict[str, list[float]]:
    if "entropy" not in done:
        return {}
    routed = done.dropna(subset="entropy")
    return {str(arm): own["entropy"].tolist() for arm, own in routed.groupby("method", sort=False)}


def _results(standing: Standing) -> pd.DataFrame:
    """As a report draws it."""
    place = {"task": standing.task, "metric": standing.metric}
    differences = {one.first: one for one in standing.against_reference}
    rows: list[dict[str, Any]] = [
        {
            "method": f"floor ({word})",
            **place,
            **{f"seed {seed}": value for seed in standing.seeds},
            "mean": value,
            "interval": "",
            "difference": "floor",
            "p": "",
        }
        for word, value in standing.floors.items()
    ]
    for arm, tests in standing.tests.items():
        row: dict[str, Any] = {"method": arm, **place, **{f"seed {seed}": tests.get(seed) for seed in standing.seeds}}
        if tests:
            examples = np.stack(list(standing.examples[arm].values()))
            interval = paired_interval(examples, np.zeros_like(examples), resamples=RESAMPLES)
            row |= {"mean": float(np.mean(list(tests.values()))), "interval": (interval.low, interval.high)}
        if arm == standing.reference:
            row |= {"difference": "reference", "p": ""}
        elif arm in differences:
            row |= {"difference": str(differences[arm].interval), "p": f"{differences[arm].p_value:.3g}"}
        rows.append(row)
    columns = ["method", "task", "metric", *(f"seed {seed}" for seed in standing.seeds), "mean", "interval"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "difference", "p"])


def _cost(grid: CompositionGrid, rows: pd.DataFrame) -> pd.DataFrame:
    done = rows[(rows["task"] == MIXTURE) & (rows["metric"] == grid.metric) & (rows["status"] == "done")]
    costs = done.groupby("method")[["trainable_parameters", "seconds"]].median()
    costs = costs.rename(columns={"trainable_parameters": "trainable parameters", "seconds": "seconds to make"})
    return costs.reindex(grid.names).rename_axis("method").reset_index()


def _findings(stages: Stages, folder: CompositionFolder) -> list[Finding]:
    return [
        Finding(**finding | {"where": f"{cell.label}: {finding['where']}"})
        for cell in stages.all
        for finding in (folder.row(cell.key) or {}).get("diagnosis", {}).get("findings", [])
    ]


def _unexamined(stages: Stages, folder: CompositionFolder) -> list[str]:
    """Which arms the doctor did not look at."""
    rows = {cell.method: folder.row(cell.key) for cell in stages.all}
    left = [arm for arm, row in rows.items() if row is not None and "diagnosis" not in row]
    words = "nothing in them is trained, or PEFT's X-LoRA cannot be loaded as the doctor loads"
    return [f"The doctor did not examine {', '.join(left)}: {words}."] if left else []


def _words(standing: Standing) -> str:
    """The reference beside what frames it, and who is told apart from it."""
    means = {arm: float(np.mean(list(tests.values()))) for arm, tests in standing.tests.items() if tests}
    if not means:
        return f"On {standing.task} nothing was run yet."
    shown = [arm for arm in (standing.reference, JOINT, HEAD) if arm in means]
    said = ", ".join(f"{arm} {means[arm]:.3f}" for arm in shown)
    seeds = max(len(tests) for tests in standing.tests.values())
    said += "".join(f", {word} floor {value:.3f}" for word, value in standing.floors.items())
    text = f"On {standing.task}, mean {standing.metric} over {seeds} seed(s): {said}."
    groups: dict[str, list[str]] = {"Better than": [], "Worse than": [], "Not told apart from": []}
    for one in standing.against_reference:
        groups[_side(standing, one)].append(one.first)
    groups_said = [f"{words} {standing.reference}: {', '.join(arms)}." for words, arms in groups.items() if arms]
    return " ".join([text, *groups_said])


def _side(standing: Standing, one: Contrast) -> str:
    if not one.told_apart:
        return "Not told apart from"
    return "Better than" if (one.interval.difference > 0) == standing.greater_is_better else "Worse than"


def _notes(grid: CompositionGrid) -> list[str]:
    head = (
        "The task head is trained once per seed on the training rows of all sources, the backbone frozen, and is "
        f"frozen in every LoRA and arm; '{HEAD}' is that model."
    )
    compared = "mean KL(LoRA || arm) in nats, 0 for the same."
    if grid.metric == LOSS:
        head = f"'{HEAD}' is the backbone as it is. Loss is in nats per token: the mean over texts of a text's mean."
        compared = f"over the whole vocabulary at every token; {compared}"
    if grid.answers == "options":
        head = (
            f"'{HEAD}' is the backbone as it is. A question is answered by the likeliest of its task's answers, "
            "by the sum of the log-probabilities of an answer's tokens, without the end token. The floors are chance "
            "and the commonest answer of the tested rows."
        )
    fitted = (
        f"{grid.rows} validation rows of the sources, which no LoRA was trained on"
        if grid.fitted_on is None
        else f"{grid.rows} examples of {grid.fitted_on}, the same for every seed; no LoRA was trained on that task"
    )
    return [
        f"{head} Arms are fitted on {fitted}.",
        f"'{JOINT}' is one LoRA trained on all sources' training rows: an upper reference, no composition.",
        "The mixture is the test rows of all sources. 'kl from own LoRA' compares, on every source's test rows, the "
        f"probabilities of an arm with those of that source's LoRA alone: {compared}",
        f"Intervals are 95 % paired bootstraps over texts and seeds ({RESAMPLES:,} draws); p is Holm's over the arms "
        "of a table. With few seeds such intervals are too narrow.",
        "The tables are of the mixture and of what no LoRA was trained on; each source's own test is in "
        "results.parquet.",
    ]


def interference_words(pairs: pd.DataFrame) -> Sequence[str]:
    """The LoRAs' cosines and sign conflicts in words; nothing where there are none."""
    if pairs.empty:
        return []
    means = pairs.groupby(["first", "second"], sort=False)[["cosine", "sign_conflict"]].mean()
    said = [
        f"{first} and {second}: cosine {row['cosine']:.3f}, sign conflict {row['sign_conflict']:.3f}"
        for (first, second), row in means.iterrows()
    ]
    return [f"Deltas of the LoRAs, pair by pair (mean over seeds): {'; '.join(said)}."]


def perplexity_words(rows: pd.DataFrame) -> Sequence[str]:
    """The perplexities on the mixture in words; nothing where classes were asked for."""
    here = rows[(rows["task"] == MIXTURE) & (rows["metric"] == PERPLEXITY)]
    if here.empty:
        return []
    means = here.groupby("method", sort=False)["value"].mean()
    said = ", ".join(f"{arm} {value:.1f}" for arm, value in means.items())
    return [f"Perplexity on the mixture, exp of the loss (mean over seeds): {said}."]
