"""Trained models under noise at test time, side by side: the same rows, the same noise, the same seeds."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.lab.robustness.noisy import NoiseKind, check_strengths, noise_kind, noisy_scores
from lamella.lab.runs.trained import Trained, find_trained, load_trained
from lamella.lab.scoring import score, selection, summands
from lamella.progress import counted, working
from lamella.statistics import contrast

_FEWEST_SEEDS = 5  # of the protocol


@dataclass(frozen=True)
class Robustness:
    """Scores of several trained models under one kind of noise.

    Attributes:
        task: its name.
        split: which one was scored.
        rows: how many examples.
        metric: name of the task's metric.
        noise: the kind of noise.
        frame: a row per run, strength, noise seed and metric: run, method, noise, strength, seed, metric, value. At
            strength 0 there is no noise, and every seed has the plain score.
        differences: a row per run but the first and strength: run, method, against, noise, strength, measure,
            difference, low, high, p. The difference is this run's mean minus the first's, with the 95 % interval and
            p of `lamella.statistics.contrast` over examples and noise seeds. Measure: accuracy, mean_squared_error, or
            for language models loss, in nats per token.
        sizes: parameters that training changed, by method.
        notes: what was cut, dropped or is short of the protocol.
    """

    task: str
    split: str
    rows: int
    metric: str
    noise: NoiseKind
    frame: pd.DataFrame
    differences: pd.DataFrame
    sizes: dict[str, int]
    notes: tuple[str, ...]

    @property
    def seeds(self) -> int:
        """How many noise seeds were drawn."""
        return int(self.frame["seed"].nunique())

    @property
    def means(self) -> pd.DataFrame:
        """The task's metric averaged over seeds: a row per method, a column per strength."""
        rows = self.frame[self.frame["metric"] == self.metric]
        return rows.pivot_table(index="method", columns="strength", values="value", sort=False)

    @property
    def summary(self) -> str:
        """The scores without and with the most noise, and how sure the differences are."""
        strongest = self.means.columns.max()
        scores = ", ".join(
            f"{name} {means[strongest]:.3f} ({means[0.0]:.3f} without)" for name, means in self.means.iterrows()
        )
        text = (
            f"On {self.rows:,} {self.split} rows of {self.task} under {self.noise.title} at {self.noise.symbol} "
            f"{strongest:g}, mean {self.metric} over {self.seeds} seed(s): {scores}."
        )
        for row in self.differences[self.differences["strength"] == strongest].itertuples():
            surely = "excludes" if row.low > 0 or row.high < 0 else "includes"
            text += (
                f" {row.method} minus {row.against}: {row.measure} {row.difference:+.3f} [{row.low:+.3f}, "
                f"{row.high:+.3f}], a 95 % paired interval that {surely} zero."
            )
        return text

    def as_dict(self) -> dict[str, Any]:
        """The tables and what they are of as plain values, for JSON."""
        return {
            "task": self.task,
            "split": self.split,
            "rows": self.rows,
            "metric": self.metric,
            "noise": self.noise.name,
            "protocol": self.noise.protocol,
            "scores": json.loads(self.frame.to_json(orient="records")),
            "differences": json.loads(self.differences.to_json(orient="records")),
            "notes": list(self.notes),
        }

    def save(self, folder: Path) -> None:
        """Write `frame` and `differences` as Parquet, each completely or not at all."""
        for name, frame in (("robustness.parquet", self.frame), ("differences.parquet", self.differences)):
            with atomic(folder / name) as unfinished:
                frame.to_parquet(unfinished)


@dataclass(frozen=True)
class _Run:
    """Where a run lies and what tables call it."""

    path: Path
    name: str
    method: str


@dataclass(frozen=True)
class _Scored:
    """One run under all its noise.

    Attributes:
        run: which one.
        task: its name.
        metric: the task's.
        metrics: every metric by strength and seed.
        examples: the score of each example, ``(examples,)``, by strength and seed.
        measure: what the mean of these scores is.
        read: the labels of the examples, or how many tokens each predicts.
        size: parameters that training changed.
        notes: what reading the rows cut or dropped.
    """

    run: _Run
    task: str
    metric: str
    metrics: dict[tuple[float, int], dict[str, float]]
    examples: dict[float, dict[int, npt.NDArray[np.float64]]]
    measure: str
    read: npt.NDArray[Any]
    size: int
    notes: tuple[str, ...]


def robustness(
    paths: Sequence[Path],
    noise: str,
    strengths: Sequence[float] | None = None,
    *,
    seeds: int = _FEWEST_SEEDS,
    task: str | None = None,
    split: str = "test",
    base: str | None = None,
) -> Robustness:
    """Score runs or adapters on all rows of a split, under noise of several strengths and seeds 0 .. seeds − 1.

    The noise on a row follows from the seed and the row alone, so every run meets the same.

    Args:
        paths: folders of runs or adapters; the others are compared with the first.
        noise: "embedding", "tokens" or "pgd".
        strengths: the kind's when None; 0, the plain score, is always among them.
        seeds: draws of the noise.
        task: any task that fits the trained heads; the runs' when None.
        split: "train", "validation" or "test".
        base: the adapters' base model, if not the one that the run or adapter names.

    Raises:
        LamellaError: an unknown noise, a strength without meaning, a folder given twice, runs of different tasks, rows
            that cannot be paired, or whatever `lamella.lab.runs.evaluating.evaluate` refuses.
    """
    kind = noise_kind(noise)
    check_strengths(kind, kind.strengths if strengths is None else strengths)
    tried = sorted({0.0, *(kind.strengths if strengths is None else strengths)})
    if seeds < 1:
        raise LamellaError(f"{seeds} seeds draw no noise. Give at least 1; the protocol asks for {_FEWEST_SEEDS}.")
    runs = _runs(paths, task)
    scored: list[_Scored] = []
    for run in counted(runs, "runs under noise", "runs"):
        # one model at a time is in memory
        trained = load_trained(run.path, task, base)
        scored.append(_scored(run, trained, kind, tried, seeds, split))
        _check_pairs(scored[0], scored[-1])
    first = scored[0]
    notes = [f"{one.run.name}: {note}" for one in scored for note in one.notes]
    if seeds < _FEWEST_SEEDS:
        notes.append(f"{seeds} noise seed(s) were drawn; the protocol asks for at least {_FEWEST_SEEDS}.")
    return Robustness(
        task=first.task,
        split=split,
        rows=len(first.read),
        metric=first.metric,
        noise=kind,
        frame=_frame(scored, kind),
        differences=_differences(scored, kind),
        sizes={one.run.method: one.size for one in scored},
        notes=tuple(notes),
    )


def strengths_of(text: str) -> tuple[float, ...]:
    """The numbers of a list such as "0,0.1,0.5".

    Raises:
        LamellaError: one is not a number.
    """
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise LamellaError(
            f"'{text}' is not a list of strengths. Write numbers with commas, such as 0,0.1,0.5."
        ) from error


def check_folder(folder: Path) -> None:
    """Raises `LamellaError` where results in ``folder`` would take the place of something else."""
    if folder.exists() and not folder.is_dir():
        raise LamellaError(f"{folder} is a file. Name a folder with -o, for the scores and the report.")
    if (folder / "run.yaml").exists():
        raise LamellaError(f"{folder} holds a run, whose report would be overwritten. Choose another folder with -o.")


def _runs(paths: Sequence[Path], task: str | None) -> list[_Run]:
    """The runs with names that differ: of the folder, or its full path; of the method, and the run where needed."""
    if not paths:
        raise LamellaError("No run was given. Name the folder of at least one run or adapter.")
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise LamellaError(f"{twice[0]} was given twice. Name each run once.")
    places = [find_trained(path) for path in paths]
    folders = Counter(path.resolve().name for path in paths)
    names = [str(path) if folders[path.resolve().name] > 1 else path.resolve().name for path in paths]
    tasks = [place.settings.task if place.settings else None for place in places]
    unlike = [at for at, name in enumerate(tasks) if name != tasks[0]]
    if task is None and unlike:
        one, two = (f"{names[at]} of {tasks[at] or 'a task it does not name'}" for at in (0, unlike[0]))
        raise LamellaError(
            f"Scores of different tasks cannot be compared: {one}, {two}. Give runs of one task, or name one that fits "
            "them all with --task."
        )
    methods = [
        place.settings.method.name if place.settings else name for place, name in zip(places, names, strict=True)
    ]
    same = Counter(methods)
    return [
        _Run(path, name, f"{method} · {name}" if same[method] > 1 else method)
        for path, name, method in zip(paths, names, methods, strict=True)
    ]


def _scored(
    run: _Run,
    trained: Trained,
    kind: NoiseKind,
    strengths: Sequence[float],
    seeds: int,
    split: str,
) -> _Scored:
    rows, encoded = trained.rows(split)
    plain = score(trained.model, trained.task, rows, encoded.collator, trained.place.reading.eval_batch_size)
    metrics: dict[tuple[float, int], dict[str, float]] = {}
    examples: dict[float, dict[int, npt.NDArray[np.float64]]] = {}
    with working(run.method, seeds * sum(strength > 0.0 for strength in strengths), "draws of noise") as work:
        for strength, seed in itertools.product(strengths, range(seeds)):
            scores = plain
            if strength > 0.0:
                scores = noisy_scores(trained, rows, encoded.collator, kind, strength, seed)
                work.advance()
            metrics[strength, seed] = scores.metrics
            measure, examples.setdefault(strength, {})[seed] = summands(scores.columns)
    return _Scored(
        run=run,
        task=trained.task.name,
        metric=selection(trained.task).name,
        metrics=metrics,
        examples=examples,
        measure=measure,
        read=plain.columns["label" if "label" in plain.columns else "tokens"],
        size=trained.size,
        notes=encoded.notes,
    )


def _check_pairs(one: _Scored, two: _Scored) -> None:
    if np.array_equal(one.read, two.read):
        return
    counts = f"{len(one.read):,} rows and {len(two.read):,}"
    raise LamellaError(
        f"{one.run.name} and {two.run.name} read {one.task} differently ({counts}, or other labels or tokens in them), "
        "so their scores cannot be paired. Compare runs with one tokenizer and the same max_length and packing."
    )


def _frame(scored: Sequence[_Scored], kind: NoiseKind) -> pd.DataFrame:
    rows = [
        (one.run.name, one.run.method, kind.name, strength, seed, metric, value)
        for one in scored
        for (strength, seed), metrics in one.metrics.items()
        for metric, value in metrics.items()
    ]
    return pd.DataFrame(rows, columns=["run", "method", "noise", "strength", "seed", "metric", "value"])


def _differences(scored: Sequence[_Scored], kind: NoiseKind) -> pd.DataFrame:
    first, *others = scored
    rows = []
    for strength in first.examples:
        by_name = {one.run.name: one.examples[strength] for one in scored}
        contrasts = {made.first: made for made in contrast(by_name, [(one.run.name, first.run.name) for one in others])}
        for one in others:
            made = contrasts[one.run.name]
            place = (one.run.name, one.run.method, first.run.method, kind.name, strength, one.measure)
            rows.append((*place, made.interval.difference, made.interval.low, made.interval.high, made.p_value))
    names = ["run", "method", "against", "noise", "strength", "measure", "difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=names)
