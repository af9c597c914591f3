"""The rows of a study of composition: every score on every test, and how much of each LoRA is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lamella.adapters import read_lora
from lamella.lab.data import Task, load_task
from lamella.lab.methods.compositions import lora_folder
from lamella.lab.runs.floors import FLOOR, MAJORITY, floor_predictions
from lamella.lab.runs.metrics import accuracy
from lamella.lab.studies.composition.answers import Floats, divergence
from lamella.lab.studies.composition.grid import ACCURACY, LOSS, CompositionGrid, StagedCell, alone
from lamella.lab.studies.composition.interference import interference
from lamella.lab.studies.composition.running import CompositionFolder, read_answers, read_masked

MIXTURE = "mixture"
FLOORS = ("linear", "majority", "chance")
KL, PERPLEXITY = "kl from own LoRA", "perplexity"
# of each metric, whether more is better
METRICS = {
    ACCURACY: True,
    LOSS: False,
    KL: False,
    "accuracy kept": True,
    "answers kept": True,
    "loss over own LoRA": False,
    PERPLEXITY: False,
}
_PLACE = ["backbone", "task", "method", "seed"]


def score_rows(
    grid: CompositionGrid, cells: Sequence[StagedCell], folder: CompositionFolder
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scores, and what they are means of.

    Returns:
        rows: backbone, task (the test), method, seed, metric, value, greater_is_better, floor_linear, floor_majority,
            floor_chance, status ("done" or "not run"), key, trainable_parameters, seconds, entropy. The metric is
            ``accuracy``, or of texts ``loss`` (nats per token, the mean over texts of a text's mean) with its
            ``perplexity``. On a source's own test, and on the mixture of all of them, also what is kept of each LoRA:
            ``kl from own LoRA`` (nats, KL(own || this), of texts a mean over tokens) and this one's score less the own
            one's, ``accuracy kept`` or ``loss over own LoRA``; of classes and options ``answers kept`` too, the share
            of equal predictions. ``seconds`` are those of building and training, ``entropy`` the routers' in nats, on
            the rows arms are watched by.
        examples: backbone, task, method, seed, metric, scores: one number for each text; the metric and KL.
    """
    found = {(cell.method, cell.seed): read_answers(folder, cell) for cell in cells}
    floors = _floors(grid, folder)
    rows, examples = [], []
    for cell in cells:
        own, row = found[cell.method, cell.seed], folder.row(cell.key)
        place = {"backbone": grid.backbone, "method": cell.method, "seed": cell.seed}
        if own is None or row is None:
            rows.append(place | {"task": MIXTURE, "metric": grid.metric, "status": "not run", "key": cell.key})
            continue
        metrics = row["metrics"]
        costs = {
            "status": "done",
            "key": cell.key,
            "trainable_parameters": metrics["trainable_parameters"],
            "seconds": metrics["build_seconds"] + metrics["train_seconds"],
            "entropy": (metrics.get("routing") or {}).get("entropy"),
        }
        alone_ones = {name: found[alone(name), cell.seed] for name in grid.sources}
        for test, texts in _tests(grid, own, alone_ones):
            for metric, values in texts.items():
                at = place | {"task": test, "metric": metric}
                floor = floors.get(test, {}) if metric == grid.metric else {}
                rows.append(at | {"value": float(values.mean()), **floor} | costs)
                if metric == LOSS:
                    rows.append(at | {"metric": PERPLEXITY, "value": float(np.exp(values.mean()))} | costs)
                if metric in (grid.metric, KL):
                    examples.append(at | {"scores": values.astype(np.float32)})
    floor_columns = [f"floor_{word}" for word in FLOORS]
    order = [*_PLACE, "metric", "value", "greater_is_better", *floor_columns, "status", "key"]
    frame = pd.DataFrame(rows).assign(greater_is_better=lambda one: one["metric"].map(METRICS))
    frame = frame.reindex(columns=[*order, "trainable_parameters", "seconds", "entropy"])
    return frame, pd.DataFrame(examples, columns=[*_PLACE, "metric", "scores"])


def _tests(
    grid: CompositionGrid, own: pd.DataFrame, alone_ones: Mapping[str, pd.DataFrame | None]
) -> Iterator[tuple[str, dict[str, Floats]]]:
    """Of each test and then of the mixture, one number per text by metric."""
    read = _of_texts if grid.metric == LOSS else _of_classes
    parts: list[dict[str, Floats]] = []
    for test in grid.tests:
        lora = alone_ones.get(test)
        texts = read(_on(own, test), None if lora is None else _on(lora, test))
        yield test, texts
        if test in grid.sources:
            parts.append(texts)
    shared = [metric for metric in METRICS if all(metric in texts for texts in parts)]
    yield MIXTURE, {metric: np.concatenate([texts[metric] for texts in parts]) for metric in shared}


def _on(found: pd.DataFrame, test: str) -> pd.DataFrame:
    return found[found["test"] == test]


def _of_classes(own: pd.DataFrame, lora: pd.DataFrame | None) -> dict[str, Floats]:
    logs, right = _answered(own)
    if lora is None:
        return {ACCURACY: right}
    theirs, theirs_right = _answered(lora)
    return {
        ACCURACY: right,
        KL: divergence(theirs, logs),
        "accuracy kept": right - theirs_right,
        "answers kept": (logs.argmax(1) == theirs.argmax(1)).astype(np.float64),
    }


def _answered(found: pd.DataFrame) -> tuple[Floats, Floats]:
    """Log-probabilities (texts, classes), and whether each text was answered rightly."""
    logs = np.stack(found["log_probs"].to_list())
    return logs, (logs.argmax(1) == found["label"].to_numpy()).astype(np.float64)


def _of_texts(own: pd.DataFrame, lora: pd.DataFrame | None) -> dict[str, Floats]:
    loss: Floats = own["loss"].to_numpy()
    if lora is None:
        return {LOSS: loss}
    return {LOSS: loss, KL: own["kl"].to_numpy(), "loss over own LoRA": loss - lora["loss"].to_numpy()}


def masked_rows(grid: CompositionGrid, cells: Sequence[StagedCell], folder: CompositionFolder) -> pd.DataFrame:
    """What arms score without each of their LoRAs: method, dropped, seed, task (the test), value, scores per text."""
    rows = []
    for cell in cells:
        found = read_masked(folder, cell)
        for dropped, own in () if found is None else found.groupby("dropped", sort=False):
            for test, texts in _tests(grid, own, {}):
                place = {"method": cell.method, "dropped": dropped, "seed": cell.seed, "task": test}
                scores = texts[grid.metric]
                rows.append(place | {"value": float(scores.mean()), "scores": scores.astype(np.float32)})
    return pd.DataFrame(rows, columns=["method", "dropped", "seed", "task", "value", "scores"])


def _floors(grid: CompositionGrid, folder: CompositionFolder) -> dict[str, dict[str, float]]:
    """Accuracy on every test of what needs no language model. Nothing of texts, which have no such floors.

    Of classes what a linear model, and the commonest label, of all sources' training rows say; of options chance, and
    the commonest answer of the tested rows themselves.
    """
    if grid.metric == LOSS:
        return {}
    tests = folder.tests.loaded()
    if grid.answers == "options":
        found = {name: _option_floors(task) for name, task in tests.items()}
    else:
        union = load_task(grid.union)
        found = {name: _class_floors(union, task) for name, task in tests.items()}
    weights = [len(tests[name].splits["test"]) for name in grid.sources]
    found[MIXTURE] = {
        word: float(np.average([found[name][word] for name in grid.sources], weights=weights))
        for word in next(iter(found.values()))
    }
    return found


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


def interference_rows(grid: CompositionGrid, cells: Sequence[StagedCell], folder: CompositionFolder) -> pd.DataFrame:
    """For each seed and pair of sources, as `interference`: seed, first, second, cosine, sign_conflict."""
    frames = []
    for seed in grid.seed_list:
        loras = {
            name: next(iter(read_lora(lora_folder(str(folder.run(cell.key)))).components.values()))
            for name in grid.sources
            for cell in cells
            if (cell.method, cell.seed) == (alone(name), seed) and folder.finished(cell.key)
        }
        if len(loras) > 1:
            frames.append(interference({name: dict(own) for name, own in loras.items()}).assign(seed=seed))
    columns = ["seed", "first", "second", "cosine", "sign_conflict"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)
