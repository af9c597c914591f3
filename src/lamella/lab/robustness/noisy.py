"""A trained model scored while noise is put on what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.lab.data import Task
from lamella.lab.data.models import is_decoder
from lamella.lab.robustness.noise import (
    changed_embeddings,
    gaussian_noise,
    input_embeddings,
    pgd,
    replaced_tokens,
    touched_tokens,
)
from lamella.lab.runs.trained import Trained
from lamella.lab.scoring import Collator, Scores, score, trains_tokens

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class NoiseKind:
    """A kind of noise.

    Attributes:
        name: what the user calls it.
        title: what a report calls it.
        symbol: of its strength.
        strengths: those that are tried unless others are given; 0 is the plain score.
        highest: the greatest strength that means something.
        protocol: what is done, in words.
    """

    name: str
    title: str
    symbol: str
    strengths: tuple[float, ...]
    highest: float
    protocol: str


NOISES = {
    kind.name: kind
    for kind in (
        NoiseKind(
            "embedding",
            "Gaussian noise on embeddings",
            "sigma",
            (0.0, 0.1, 0.2, 0.5, 1.0),
            math.inf,
            "N(0, (sigma·rms)²) is added to the input embeddings of real, non-special tokens, rms taken over those of "
            "the sequence itself",
        ),
        NoiseKind(
            "tokens",
            "token replacement",
            "p",
            (0.0, 0.05, 0.1, 0.2),
            1.0,
            "each real, non-special token is replaced with probability p by another one, drawn evenly from the "
            "vocabulary; labels stay",
        ),
        NoiseKind(
            "pgd",
            "an attack on embeddings (PGD)",
            "radius",
            (0.0, 0.02, 0.05, 0.1),
            math.inf,
            "the input embeddings of real, non-special tokens are moved to where ten steps of projected gradient "
            "ascent on the task loss, from a random start, find it highest; the L2 ball of a sequence has radius times "
            "the norm of those embeddings. A routed model's choices have no gradient, so this bounds the worst case "
            "from below only",
        ),
    )
}


def noise_kind(name: str) -> NoiseKind:
    """The kind of that name; raises `LamellaError` with the known ones."""
    if name not in NOISES:
        raise LamellaError(f"There is no noise '{name}'. Choose one of {', '.join(NOISES)}.")
    return NOISES[name]


def noisy_scores(
    trained: Trained, rows: Dataset, collator: Collator, kind: NoiseKind, strength: float, seed: int
) -> Scores:
    """`lamella.lab.scoring.score` of the rows of a split with noise on their way into the model.

    Args:
        trained: the model, its task and its tokenizer.
        rows: encoded, of one split; a row's noise follows from ``seed`` and its place among them.
        collator: of these rows.
        kind: the noise.
        strength: of the noise.
        seed: of the noise.

    Raises:
        LamellaError: the model reads no ids or has no input embeddings.
    """
    reading = trained.place.reading
    # an attack keeps what a training step keeps
    batch_size = min(reading.batch_size, reading.eval_batch_size) if kind.name == "pgd" else reading.eval_batch_size
    numbered = rows.add_column("noise_row", list(range(len(rows))))
    return score(_Noisy(trained, kind, strength, seed), trained.task, numbered, _numbered(collator), batch_size)


def _numbered(collator: Collator) -> Collator:
    """Batches that also say which rows they are of, and what an attack is to make unlikely."""

    def collate(rows: list[Any]) -> Mapping[str, Tensor]:
        batch = collator(rows)
        # the attack on a decoder's multiple choice makes the wrong options likely and the right one unlikely
        signs = [1.0 if row.get("choice") == row.get("answer") else -1.0 for row in rows]
        facts = {"noise_rows": torch.tensor([row["noise_row"] for row in rows]), "noise_signs": torch.tensor(signs)}
        return {**batch, **facts, "noise_targets": batch["labels"]}

    return collate


@dataclass(frozen=True)
class _Batch:
    """What the model is given, and what noise has to know of it.

    Attributes:
        inputs: of the model's forward.
        ids: of every sequence, (N, T); each option of a question is a sequence.
        touched: the tokens that noise may change, (N, T).
        rows: number of each sequence in the split, N of them.
        targets: the labels of the B rows.
        signs: 1 where an attack raises a row's loss, -1 where it lowers it, (B,).
    """

    inputs: dict[str, Tensor]
    ids: Tensor
    touched: Tensor
    rows: list[int]
    targets: Tensor
    signs: Tensor


class _Noisy(nn.Module):
    """A model behind noise: its forward takes the batches of `_numbered` and gives the outputs of the model."""

    def __init__(self, trained: Trained, kind: NoiseKind, strength: float, seed: int) -> None:
        super().__init__()
        self.model = trained.model
        self.config = trained.model.config
        self._task, self._strength, self._seed = trained.task, strength, seed
        self._noise = {"embedding": self._perturbed, "tokens": self._replaced, "pgd": self._attacked}[kind.name]
        self._special, self._vocabulary = _vocabulary(trained)

    def forward(self, noise_rows: Tensor, noise_targets: Tensor, noise_signs: Tensor, **inputs: Tensor) -> Any:
        ids = inputs["input_ids"].view(-1, inputs["input_ids"].shape[-1])
        mask = inputs["attention_mask"].view(ids.shape)
        options = len(ids) // len(noise_rows)
        rows = [row * options + option for row in noise_rows.tolist() for option in range(options)]
        touched = touched_tokens(ids, mask, self._special)
        return self._noise(_Batch(inputs, ids, touched, rows, noise_targets, noise_signs))

    def _perturbed(self, batch: _Batch) -> Any:
        def change(clean: Tensor) -> Tensor:
            noise = gaussian_noise(clean, batch.touched, batch.rows, self._strength, self._seed)
            return clean + noise.to(clean.dtype)

        return self._changed(batch, change)

    def _replaced(self, batch: _Batch) -> Any:
        ids = replaced_tokens(batch.ids, batch.touched, batch.rows, self._strength, self._seed, self._vocabulary)
        return self.model(**{**batch.inputs, "input_ids": ids.view(batch.inputs["input_ids"].shape)})

    def _attacked(self, batch: _Batch) -> Any:
        def output(delta: Tensor) -> Any:
            return self._changed(batch, lambda clean: clean + delta.to(clean.dtype))

        def losses(delta: Tensor) -> Tensor:
            each = batch.signs * task_losses(self._task, self.model, output(delta).logits, batch.targets)  # (B,)
            return each.repeat_interleave(len(batch.ids) // len(each))  # (N,)

        clean = input_embeddings(self.model)(batch.ids)
        return output(pgd(losses, clean, batch.touched, batch.rows, self._strength, self._seed))

    def _changed(self, batch: _Batch, change: Callable[[Tensor], Tensor]) -> Any:
        rows, tokens = batch.ids.shape
        with changed_embeddings(self.model, (rows, tokens), change):
            return self.model(**batch.inputs)


def _vocabulary(trained: Trained) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """The special ids, and the others that the model has an embedding for, in ascending order."""
    tokenizer = trained.tokenizer
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = sorted(added | set(tokenizer.all_special_ids))
    known = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    known = known[known < trained.model.config.get_text_config().vocab_size]
    return torch.tensor(special, dtype=torch.long), np.setdiff1d(known, special)


def task_losses(task: Task, model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row (B,): cross-entropy, squared error, or the summed loss of its target tokens."""
    if task.kind == "regression":
        return (logits.squeeze(-1).float() - targets) ** 2
    if task.kind not in ("causal-lm", "seq2seq") and not trains_tokens(task, model):
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    logits = logits[:, -targets.shape[1] :]  # prompt tuning puts virtual tokens in front
    if is_decoder(cast(Any, model).config):  # position t predicts the token at t + 1
        logits, targets = logits[:, :-1], targets[:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=-100, reduction="none")
    return each.sum(1)


def check_strengths(kind: NoiseKind, strengths: Sequence[float]) -> None:
    """Raises `LamellaError` where a strength is given twice or means nothing for this kind of noise."""
    for strength in strengths:
        if not 0.0 <= strength <= kind.highest or math.isinf(strength):
            allowed = "0 or more" if math.isinf(kind.highest) else f"from 0 to {kind.highest:g}"
            raise LamellaError(
                f"{kind.symbol}={strength:g} is not a strength of the noise '{kind.name}'; it is {allowed}."
            )
    if not strengths or len(set(strengths)) < len(strengths):
        raise LamellaError(
            f"The strengths of the noise are {', '.join(f'{s:g}' for s in strengths) or 'none'}. "
            "Give at least one, and each only once."
        )
