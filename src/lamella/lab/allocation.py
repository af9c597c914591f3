"""Experts per layer from data: what a trained run shows of its experts, or a frozen model of texts and of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.errors import LamellaError
from lamella.lab.data import load_backbone
from lamella.lab.runs.trained import load_adapted, load_trained
from lamella.lab.scoring import score, selection
from lamella.texts import text_batches
from lamella.tuners.mola import allocate
from lamella.tuners.mola.needs import Needs, contribution, distinctness, diversity, heavy_tails, of_one_depth

OF_RUNS, OF_MODELS = ("redundancy", "contribution"), ("diversity", "heavy-tails")

# what a budget is where nothing says one: the mean of the published shapes
_USUAL_BUDGET = 5.0


@dataclass(frozen=True)
class Allocated:
    """An allocation and what it follows from.

    Attributes:
        criterion: by which it was made.
        needs: how much each layer needs experts, in the criterion's own unit.
        experts: of each layer; they sum to the budget.
    """

    criterion: str
    needs: tuple[float, ...]
    experts: tuple[int, ...]


def allocate_from(
    source: str,
    criterion: str | None = None,
    *,
    texts: Sequence[Any] = (),
    budget: float | None = None,
    rows: int = 64,
) -> Allocated:
    """Experts per layer from a trained MoLA run, or from a model that is not trained yet.

    Args:
        source: folder of a run or an adapter; or a model: a demo model, a hub id or a path.
        criterion: "redundancy" of a run's experts (its default), or their "contribution", the loss without each on
            validation rows; "diversity" of what a model makes of texts (the default with texts), or the "heavy-tails"
            of its weights.
        texts: for diversity, what `lamella.texts.text_batches` takes, each a task; of one, documents are compared.
        budget: mean experts per layer; the run's own, or 5.
        rows: validation rows, or documents of each text, always the same ones; never of a test split.

    Raises:
        LamellaError: a criterion that does not go with the source, texts that nothing reads, or nothing to load.
    """
    is_run = (Path(source) / "run.yaml").is_file() or (Path(source) / "adapter_config.json").is_file()
    criterion = criterion or ("redundancy" if is_run else "diversity" if texts else "heavy-tails")
    known = OF_RUNS if is_run else OF_MODELS
    if criterion not in known:
        raise LamellaError(
            f"The criteria of {'a trained run' if is_run else 'a model'}, as {source} is, are {' and '.join(known)}, "
            f"not {criterion!r}."
        )
    if texts and criterion != "diversity":
        raise LamellaError(f"The criterion {criterion!r} reads no text. Leave it out, or choose diversity.")
    if is_run:
        needs, mean = _of_run(Path(source), criterion, rows)
    else:
        needs, mean = _of_model(source, criterion, texts, rows), _USUAL_BUDGET
    values = of_one_depth(needs)
    experts = allocate("auto", len(values), mean if budget is None else budget, values)
    return Allocated(criterion, tuple(values), tuple(experts))


def _of_run(path: Path, criterion: str, rows: int) -> tuple[Needs, float]:
    """What its layers need, and the mean number of experts that they have."""
    if criterion == "redundancy":
        model = load_adapted(path)
        return distinctness(model), _mean_experts(model)
    trained = load_trained(path)
    chosen, encoded = trained.rows("validation", rows)

    def loss() -> float:
        scores = score(trained.model, trained.task, chosen, encoded.collator, trained.place.reading.eval_batch_size)
        if "loss" in scores.metrics:
            return scores.metrics["loss"]
        return -scores.metrics[selection(trained.task).name]  # of answers that are chosen by a decoder

    return contribution(trained.model, loss), _mean_experts(trained.model)


def _mean_experts(model: Any) -> float:
    summary = getattr(model.base_model, "summary", lambda: None)()
    if summary is None or not summary.experts:
        raise LamellaError("The run's model has no experts whose number could be another. Give a run of MoLA.")
    counts = [count for of_stack in summary.experts.values() for count in of_stack]
    return float(sum(counts) / len(counts))


def _of_model(name: str, criterion: str, texts: Sequence[Any], rows: int) -> Needs:
    if criterion == "diversity" and not texts:
        raise LamellaError("The criterion 'diversity' reads texts. Give some, as in --text trec --text movies.")
    backbone = load_backbone(name)
    model = backbone.model.eval()
    if criterion == "heavy-tails":
        return heavy_tails(model)
    return diversity(model, [text_batches(text, backbone.tokenizer, limit=rows) for text in texts])
