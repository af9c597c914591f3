"""What studies of composition measure: every score on every test, what is kept of each LoRA, and how LoRAs conflict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch

from lamella.adapters import Factors, read_lora
from lamella.lab.data import Task, load_task
from lamella.lab.methods.compositions import Modules, lora_folder
from lamella.lab.metrics import accuracy
from lamella.lab.runs.floors import FLOOR, MAJORITY, floor_predictions
from lamella.lab.studies.answers import Questions, divergence
from lamella.lab.studies.cells import Cell
from lamella.lab.studies.folder import StudyFolder, answered, answered_masked
from lamella.lab.studies.recipe import Measured
from lamella.lab.studies.results import COSTS, Floats, examples_frame, place_of, results_frame
from lamella.statistics import SIGNIFICANT, Interval, contrast, holm

MIXTURE = "mixture"
KL, PERPLEXITY = "kl from own LoRA", "perplexity"
# of each metric, whether more is better
METRICS = {
    "accuracy": True,
    "loss": False,
    KL: False,
    "accuracy kept": True,
    "answers kept": True,
    "loss over own LoRA": False,
    PERPLEXITY: False,
}


def measured(
    questions: Questions,
    metric: str,
    loras: Mapping[str, str],
    union: str | None,
    cells: Sequence[Cell],
    folder: StudyFolder,
) -> Measured:
    """The tables of a study of composition: results, examples, interference, and masked where LoRAs were left out.

    The metric is ``accuracy``, or of texts ``loss`` (nats per token, the mean over texts of a text's mean) with its
    ``perplexity``. On a source's test, and on the mixture of all of them, also what is kept of each LoRA: ``kl from
    own LoRA`` (nats, KL(LoRA || this), of texts a mean over tokens) and this one's score less that LoRA's, ``accuracy
    kept`` or ``loss over own LoRA``; of classes and options ``answers kept`` too, the share of equal predictions.

    Args:
        questions: what the models were asked.
        metric: what tests are scored by.
        loras: the source of each cell that trains a LoRA for one, by the name of its method.
        union: the task of all sources together, whose training rows make the floors of classes.
        cells: of the study.
        folder: where they lie.
    """
    sources = list(loras.values())
    alone = {(loras[cell.method], cell.seed): cell for cell in cells if cell.method in loras}
    answers = {place: answered(folder, cell) for place, cell in alone.items()}
    floors = _floors(questions, sources, union) if metric == "accuracy" else {}
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for cell in cells:
        place = place_of(cell) | {"key": cell.key, "split": "test"}
        ours, row = answered(folder, cell), folder.row(cell.key)
        if ours is None or row is None:
            rows.append(place | {"task": MIXTURE, "metric": metric, "status": "not run"})
            continue
        metrics = row["metrics"]
        costs = {name: metrics.get(name) for name in COSTS} | {"status": "done"}
        costs["entropy"] = (metrics.get("routing") or {}).get("entropy")
        theirs = {source: answers[source, cell.seed] for source in sources}
        for test, texts in _tests(questions, metric, ours, theirs):
            for name, values in texts.items():
                at = place | {"task": test, "metric": name}
                floor = floors.get(test, {}) if name == metric else {}
                rows.append(at | {"value": float(values.mean()), **floor} | costs)
                if name == "loss":
                    rows.append(at | {"metric": PERPLEXITY, "value": float(np.exp(values.mean()))} | costs)
                if name in (metric, KL):
                    examples.append(at | {"scores": values})
    for row in rows:
        row["greater_is_better"] = METRICS[row["metric"]]
    name = folder.path.name
    tables = {
        "results": results_frame(rows, name),
        "examples": examples_frame(examples, name),
        "interference": _interference(alone, folder),
    }
    if any(cell.masked for cell in cells):
        tables["masked"] = _masked(questions, metric, sources, cells, folder)
    return Measured(tables, remarks(tables))


def remarks(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What a study's tables say besides its scores."""
    return [
        *_interference_words(tables["interference"]),
        *_perplexity_words(tables["results"]),
        *(masking_words(tables["masked"], tables["examples"]) if "masked" in tables else []),
    ]


def _tests(
    questions: Questions, metric: str, ours: pd.DataFrame, theirs: Mapping[str, pd.DataFrame | None]
) -> Iterator[tuple[str, dict[str, Floats]]]:
    """Of each test and then of the mixture, one number per text by metric."""
    read = _of_texts if metric == "loss" else _of_classes
    parts: list[dict[str, Floats]] = []
    for test in questions.tasks:
        lora = theirs.get(test)
        texts = read(_on(ours, test), None if lora is None else _on(lora, test))
        yield test, texts
        if test in theirs:
            parts.append(texts)
    shared = [metric for metric in METRICS if all(metric in texts for texts in parts)]
    yield MIXTURE, {metric: np.concatenate([texts[metric] for texts in parts]) for metric in shared}


def _on(answers: pd.DataFrame, test: str) -> pd.DataFrame:
    return answers[answers["test"] == test]


def _of_classes(ours: pd.DataFrame, lora: pd.DataFrame | None) -> dict[str, Floats]:
    logs, right = _answered(ours)
    if lora is None:
        return {"accuracy": right}
    theirs, theirs_right = _answered(lora)
    return {
        "accuracy": right,
        KL: divergence(theirs, logs),
        "accuracy kept": right - theirs_right,
        "answers kept": (logs.argmax(1) == theirs.argmax(1)).astype(np.float64),
    }


def _answered(answers: pd.DataFrame) -> tuple[Floats, Floats]:
    """Log-probabilities (texts, classes), and whether each text was answered rightly."""
    logs = np.stack(answers["log_probs"].to_list())
    return logs, (logs.argmax(1) == answers["label"].to_numpy()).astype(np.float64)


def _of_texts(ours: pd.DataFrame, lora: pd.DataFrame | None) -> dict[str, Floats]:
    loss: Floats = ours["loss"].to_numpy()
    if lora is None:
        return {"loss": loss}
    return {"loss": loss, KL: ours["kl"].to_numpy(), "loss over own LoRA": loss - lora["loss"].to_numpy()}


def _masked(
    questions: Questions, metric: str, sources: Sequence[str], cells: Sequence[Cell], folder: StudyFolder
) -> pd.DataFrame:
    """Scores of methods without each of their LoRAs: method, dropped, seed, task (the test), value, scores per text."""
    rows = []
    for cell in cells:
        answers = answered_masked(folder, cell)
        for dropped, rest in () if answers is None else answers.groupby("dropped", sort=False):
            for test, texts in _tests(questions, metric, rest, dict.fromkeys(sources)):
                place = {"method": cell.method, "dropped": dropped, "seed": cell.seed, "task": test}
                scores = texts[metric]
                rows.append(place | {"value": float(scores.mean()), "scores": scores.astype(np.float32)})
    return pd.DataFrame(rows, columns=["method", "dropped", "seed", "task", "value", "scores"])


def _floors(questions: Questions, sources: Sequence[str], union: str | None) -> dict[str, dict[str, float]]:
    """Accuracy on every test, and on the mixture, of what needs no language model.

    Of classes what a linear model, and the commonest label, of all sources' training rows say; of options chance, and
    the commonest answer of the tested rows themselves.
    """
    tests = questions.loaded()
    if union is None:
        floors = {name: _option_floors(task) for name, task in tests.items()}
    else:
        training = load_task(union)
        floors = {name: _class_floors(training, task) for name, task in tests.items()}
    weights = [len(tests[name].splits["test"]) for name in sources]
    floors[MIXTURE] = {
        floor: float(np.average([floors[name][floor] for name in sources], weights=weights))
        for floor in next(iter(floors.values()))
    }
    return floors


def _class_floors(union: Task, tested: Task) -> dict[str, float]:
    test = tested.splits["test"]
    task = replace(union, splits={"train": union.splits["train"], "test": test})
    guesses, labels = floor_predictions(task), np.asarray(test["label"])
    words = {"floor_linear": FLOOR, "floor_majority": MAJORITY}
    return {word: accuracy(guesses[floor]["test"], labels) for word, floor in words.items()}


def _option_floors(task: Task) -> dict[str, float]:
    answers = list(task.splits["test"]["target"])
    commonest = max(map(answers.count, task.label_names)) / len(answers)
    return {"floor_chance": 1 / len(task.label_names), "floor_majority": commonest}


def _interference(alone: Mapping[tuple[str, int], Cell], folder: StudyFolder) -> pd.DataFrame:
    """For each seed and pair of sources, as `interference`: seed, first, second, cosine, sign_conflict."""
    frames = []
    for seed in dict.fromkeys(seed for _, seed in alone):
        loras: dict[str, Modules] = {}
        for (source, trained_with), cell in alone.items():
            if trained_with == seed and folder.finished(cell.key):
                read = read_lora(lora_folder(str(folder.run(cell.key))))
                loras[source] = dict(next(iter(read.components.values())))
        if len(loras) > 1:
            frames.append(interference(loras).assign(seed=seed))
    columns = ["seed", "first", "second", "cosine", "sign_conflict"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def interference(loras: Mapping[str, Modules]) -> pd.DataFrame:
    """A row per pair of LoRAs: first, second, cosine, sign_conflict.

    ``cosine``: of their deltas as one long vector over all modules. ``sign_conflict``: share of entries, among those
    that neither leaves at zero, where the signs differ; unrelated deltas have a half. Both are nan where the LoRAs
    share no module.
    """
    rows = []
    for first, second in combinations(loras, 2):
        one, other = loras[first], loras[second]
        conflicts, entries, product = 0, 0, 0.0
        for module in one.keys() & other.keys():
            a, b = _delta(one[module]), _delta(other[module])
            product += float((a * b).sum())
            both = (a != 0) & (b != 0)
            conflicts += int(((a > 0) != (b > 0))[both].sum())
            entries += int(both.sum())
        lengths = [
            sum(float(_delta(factors).square().sum()) for factors in lora.values()) ** 0.5 for lora in (one, other)
        ]
        scale = lengths[0] * lengths[1]
        row = {"first": first, "second": second, "cosine": product / scale if scale and entries else float("nan")}
        rows.append(row | {"sign_conflict": conflicts / entries if entries else float("nan")})
    return pd.DataFrame(rows)


def _delta(factors: Factors) -> torch.Tensor:
    return factors.scaling * factors.B.double() @ factors.A.double()  # (out, in)


def _interference_words(pairs: pd.DataFrame) -> Sequence[str]:
    """The LoRAs' cosines and sign conflicts in words; nothing where there are none."""
    if pairs.empty:
        return []
    means = pairs.groupby(["first", "second"], sort=False)[["cosine", "sign_conflict"]].mean()
    said = [
        f"{first} and {second}: cosine {row['cosine']:.3f}, sign conflict {row['sign_conflict']:.3f}"
        for (first, second), row in means.iterrows()
    ]
    return [f"Deltas of the LoRAs, pair by pair (mean over seeds): {'; '.join(said)}."]


def _perplexity_words(rows: pd.DataFrame) -> Sequence[str]:
    """The perplexities on the mixture in words; nothing where classes were asked for."""
    here = rows[(rows["task"] == MIXTURE) & (rows["metric"] == PERPLEXITY)]
    if here.empty:
        return []
    means = here.groupby("method", sort=False)["value"].mean()
    said = ", ".join(f"{method} {value:.1f}" for method, value in means.items())
    return [f"Perplexity on the mixture, exp of the loss (mean over seeds): {said}."]


@dataclass(frozen=True)
class _Loss:
    """One method without one LoRA on one test: its score, and that less its score with all of them."""

    method: str
    dropped: str
    test: str
    score: float
    interval: Interval
    significant: bool

    @property
    def words(self) -> str:
        mark = "*" if self.significant else ""
        return f"{self.score:.3f} ({self.interval}){mark}"


def masking_words(masked: pd.DataFrame, examples: pd.DataFrame) -> list[str]:
    """A sentence for each masked method: what leaving out each LoRA changes on the mixture and on that LoRA's test."""
    said: dict[str, list[str]] = {}
    for one in _losses(masked, examples):
        if one.test in (MIXTURE, one.dropped):
            where = "on the mixture" if one.test == MIXTURE else "on its own test"
            said.setdefault(one.method, []).append(f"without {one.dropped} {where} {one.words}")
    return [f"{method} with a LoRA left out: {'; '.join(words)}. {READING}" for method, words in said.items()]


def masking_table(masked: pd.DataFrame, examples: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The same on every test: heads and rows of a table."""
    losses = list(_losses(masked, examples))
    tests = list(dict.fromkeys(one.test for one in losses))
    rows = []
    for method, dropped in dict.fromkeys((one.method, one.dropped) for one in losses):
        here = {one.test: one.words for one in losses if (one.method, one.dropped) == (method, dropped)}
        rows.append([method, dropped, *(here[test] for test in tests)])
    return ["method", "dropped", *tests], rows


READING = (
    "In brackets: the difference from the method with all its LoRAs, with its 95 % interval; a star where it is "
    "significant (Holm over the tests and LoRAs of a method)."
)


def _losses(masked: pd.DataFrame, examples: pd.DataFrame) -> Iterator[_Loss]:
    examples = examples[examples["metric"] != KL]
    for method, of_method in masked.groupby("method", sort=False):
        complete = examples[examples["method"] == method]
        values = of_method.groupby(["dropped", "task"], sort=False)["value"].mean()
        measured: dict[tuple[str, str], tuple[float, Interval]] = {}
        for test, on_test in of_method.groupby("task", sort=False):
            scores = {"": _by_seed(complete[complete["task"] == test])}
            scores |= {dropped: _by_seed(rows) for dropped, rows in on_test.groupby("dropped", sort=False)}
            for one in contrast(scores, [(dropped, "") for dropped in scores if dropped]):
                measured[one.first, str(test)] = values[one.first, test], one.interval
        places = [place for place in values.index if place in measured]
        corrected = holm([measured[place][1].p_value for place in places])
        for (dropped, test), p_value in zip(places, corrected, strict=True):
            yield _Loss(str(method), dropped, test, *measured[dropped, test], p_value < SIGNIFICANT)


def _by_seed(frame: pd.DataFrame) -> dict[int, Floats]:
    return {int(seed): np.asarray(one, np.float64) for seed, one in zip(frame["seed"], frame["scores"], strict=True)}
