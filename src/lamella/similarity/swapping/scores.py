"""What a model scores on each text by itself, whatever the texts beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lamella.backbones.modes import evaluating
from lamella.backbones.offloading import input_device
from lamella.errors import LamellaError
from lamella.progress import counted
from lamella.statistics import perplexity

Metric = Literal["nll", "accuracy"]
Batch = Mapping[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class TextScores:
    """A score and a weight for each text, in the order of the batches; the model's score is the ratio of their sums.

    Attributes:
        sums: nats of all predicted tokens of the text, or 1.0 where its label was found, ``(texts,)``.
        weights: how many tokens were predicted, or 1.0, ``(texts,)``.
    """

    sums: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]

    @property
    def value(self) -> float:
        """Nats per token, or the share of texts whose label was found."""
        return float(self.sums.sum() / self.weights.sum())

    @property
    def perplexity(self) -> float:
        """exp of nats per token; infinite where that is beyond a float."""
        return perplexity(float(self.sums.sum()), int(self.weights.sum()))


def text_scores(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: Metric,
    choices: Sequence[int] | None = None,
    name: str = "the model",
) -> TextScores:
    """Scores every text, evaluating and without gradients.

    "nll": the loss of every token of ``labels``; a decoder without labels predicts its own text, each real token after
    a real one. "accuracy": a classifier's likeliest class is the label; where labels are tokens, every token of them is
    the likeliest after those before it, which is when greedy decoding writes the label, choosing among ``choices``.

    Args:
        model: a causal language model, an encoder-decoder or a classifier.
        batches: what the model is called with; ``labels`` where there are any.
        metric: which score.
        choices: for accuracy of label tokens, the tokens that may be written; None for all.
        name: what errors call the model.

    Raises:
        LamellaError: an unknown metric, no texts, nothing to predict, labels missing, logits that are not finite.
    """
    if metric not in get_args(Metric):
        raise LamellaError(f"metric={metric!r} is not one of {', '.join(get_args(Metric))}.")
    device = input_device(model)
    allowed = None if choices is None else torch.tensor(choices, device=device)
    parts = []
    with evaluating(model), torch.no_grad():
        for batch in counted(batches, "scoring", "batches"):
            parts.append(batch_scores(model, inputs_on(device, batch), metric, allowed, name))
    if not parts:
        raise LamellaError("There are no texts to measure a swap on; give at least one batch.")
    sums, weights = (torch.cat(columns).cpu().numpy() for columns in zip(*parts, strict=True))
    if weights.sum() == 0:
        raise LamellaError("No token of the texts is predicted, so a swap has no effect to measure; give longer texts.")
    return TextScores(sums, weights)


def batch_scores(
    model: nn.Module,
    inputs: dict[str, Tensor],
    metric: Metric = "nll",
    choices: Tensor | None = None,
    name: str = "the model",
) -> tuple[Tensor, Tensor]:
    """Sums and weights of one batch as in ``TextScores``, each ``(B,)`` float64; gradients flow where they are on."""
    config: Any = model.config
    labels = inputs.get("labels")
    if not config.is_encoder_decoder:
        inputs = {key: tensor for key, tensor in inputs.items() if key != "labels"}
    elif labels is None:
        raise LamellaError("An encoder-decoder is measured on what it writes: give batches with labels.")
    logits = model(**inputs).logits
    if not torch.isfinite(logits).all():
        raise LamellaError(
            f"The logits of {name} are not finite, so there is no effect to measure; load the model in bfloat16 or "
            "float32, or leave this swap out."
        )
    if logits.dim() == 2:
        return _of_classes(logits, labels, metric)
    if not config.is_encoder_decoder:
        if labels is None and metric == "accuracy":
            raise LamellaError("Accuracy needs labels: give batches with labels, or measure metric='nll'.")
        labels = _targets(inputs, labels)[:, 1:]
        logits = logits[:, :-1]  # position t predicts the token at t + 1
    assert labels is not None
    # row by row: a whole batch of float32 log-probabilities over a vocabulary is large
    rows = [_of_tokens(*row, metric, choices) for row in zip(logits, labels, strict=True)]
    sums, weights = zip(*rows, strict=True)
    return torch.stack(sums), torch.stack(weights)


def _of_classes(logits: Tensor, labels: Tensor | None, metric: Metric) -> tuple[Tensor, Tensor]:
    if labels is None:
        raise LamellaError("A classifier is measured against labels: give batches with labels.")
    if metric == "accuracy":
        sums = (logits.argmax(-1) == labels).double()  # (B,)
    else:
        sums = nn.functional.cross_entropy(logits.float(), labels, reduction="none").double()  # (B,)
    return sums, torch.ones_like(sums)


def _of_tokens(logits: Tensor, labels: Tensor, metric: Metric, choices: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum and weight of one text, from logits ``(T, vocabulary)`` and labels ``(T,)``."""
    predicted = labels != IGNORED
    if metric == "accuracy":
        written = logits.argmax(-1) if choices is None else choices[logits[:, choices].argmax(-1)]  # (T,)
        right = (written == labels) | ~predicted  # (T,)
        return right.all().double(), predicted.any().double()
    losses = nn.functional.cross_entropy(logits[predicted].float(), labels[predicted], reduction="none")
    return losses.double().sum(), predicted.sum().double()


def _targets(inputs: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
    """The labels ``(B, T)`` of a decoder, ignored where a token or the one before it is padding."""
    ids = inputs["input_ids"] if labels is None else labels
    mask = inputs.get("attention_mask")
    if mask is None:
        return ids
    real = mask.bool()
    return ids.masked_fill(~(real & real.roll(1, dims=1)), IGNORED)


def inputs_on(device: torch.device, batch: Batch) -> dict[str, Tensor]:
    """What the model is called with: all but ``rows``, by which batches may number their texts."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "rows"}
