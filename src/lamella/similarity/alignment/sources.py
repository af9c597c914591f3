"""What a source brings to every one of its pairs: tokens in three parts, variances, and draws for its intervals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lamella.backbones.moe import Expert
from lamella.errors import LamellaError
from lamella.similarity.activations.keys import hashed
from lamella.similarity.pairs import Name

if TYPE_CHECKING:
    from lamella.similarity.activations import Capture

MINIMUM = 32  # samples under which an expert is not a source
STOP_SHARE = 0.2  # of the training documents, for early stopping
FEWEST_DOCUMENTS = 5  # held out, under which there is no interval
DRAWS = 1000
_STOP_WORD = 0x73746F70  # keeps this split apart from the held-out one


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a source's tokens: ``x (n, h)`` and what the source makes of them, ``y (n, out)``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def variance(self) -> float:
        """Mean over elements of (y − mean of y)², the mean taken over tokens."""
        return float((self.y - self.y.mean(0)).square().mean())


@dataclass(frozen=True, eq=False)
class Source:
    """An expert whose place is to be taken.

    Attributes:
        name: layer and expert.
        train, stop, held_out: its tokens; no document is in two of them.
        documents: of each held-out token, counted from 0, ``(n,)``.
    """

    name: Name
    train: Part
    stop: Part
    held_out: Part
    documents: Tensor

    @cached_property
    def train_variance(self) -> float:
        """Of what it puts out on the training tokens."""
        return self.train.variance

    @cached_property
    def variance(self) -> float:
        """Of what it puts out on the held-out tokens: the denominator of every normalised error."""
        return self.held_out.variance

    @cached_property
    def mean_errors(self) -> Tensor:
        """Errors of always saying the mean of the training outputs, as `by_document`."""
        return self.by_document((self.held_out.y - self.train.y.mean(0)).square().mean(-1))

    def by_document(self, errors: Tensor) -> Tensor:
        """Sums per held-out document of each token's error ``(n,)``, float64 ``(documents,)`` on the CPU."""
        sums = torch.zeros(int(self.documents.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, self.documents, errors.double().cpu())

    def upper_difference(self, errors: Tensor, control: Tensor) -> float:
        """The 97.5th percentile of nmse less the control's nmse, held-out documents drawn anew with replacement.

        Below 0 the errors are smaller than the control's beyond what the choice of documents explains. NaN for fewer
        than `FEWEST_DOCUMENTS` documents.

        Args:
            errors, control: per document, as `by_document` gives them.
        """
        if len(errors) < FEWEST_DOCUMENTS:
            return float("nan")
        counts, tokens = self._draws
        differences = counts @ (errors - control).numpy() / tokens / self.variance  # (draws,)
        return float(np.quantile(differences, 0.975))

    @cached_property
    def _draws(self) -> tuple[np.ndarray, np.ndarray]:
        """How often each document is in each draw ``(draws, documents)``, and the tokens of each draw."""
        sizes = torch.bincount(self.documents).numpy()
        generator = np.random.default_rng(self.name)
        counts = generator.multinomial(len(sizes), np.full(len(sizes), 1.0 / len(sizes)), size=DRAWS)
        return counts.astype(np.float64), counts @ sizes


@torch.no_grad()
def read_source(
    capture: Capture, name: Name, expert: Expert, held_out: float, score_on: Capture | None = None, seed: int = 0
) -> Source | str:
    """An expert as a source, or why it cannot be one.

    Args:
        capture: its tokens; their held-out part is scored.
        name: layer and expert.
        expert: what makes outputs of them, in its own precision.
        held_out: share of the documents.
        score_on: a capture of other text, whose held-out part is scored instead.
        seed: of the choice of documents to stop by; the held-out ones are the same for every seed.

    Raises:
        LamellaError: an input or output that is not finite.
    """
    train, held = capture.split(*name, held_out=held_out)
    rows = capture.rows(*name)
    captured = len(rows)
    learn, stop = _apart(train, rows, seed)
    x = capture.inputs(*name)
    other = x
    if score_on is not None:
        held, other, rows = score_on.split(*name, held_out=held_out)[1], score_on.inputs(*name), score_on.rows(*name)
    if captured < MINIMUM or len(learn) < 2 or not len(stop) or len(held) < 2:
        return (
            f"expert {name[1]} of layer {name[0]} has {captured} samples ({len(learn)} to train on, {len(stop)} to "
            f"stop by, {len(held)} held out)"
        )
    documents = torch.unique(rows[held], return_inverse=True)[1]
    training, stopping, scoring = (_part(name, expert, tokens) for tokens in (x[learn], x[stop], other[held]))
    source = Source(name, training, stopping, scoring, documents)
    if not source.variance > 0 or not source.train_variance > 0:
        return f"expert {name[1]} of layer {name[0]} puts out the same for every token"
    return source


def _apart(train: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Training samples to learn from and to stop by: one in five documents, at least one, is for the latter."""
    documents, places = torch.unique(rows[train], return_inverse=True)
    order = hashed(_STOP_WORD, seed, documents).argsort()
    stopping = torch.zeros(len(documents), dtype=torch.bool)
    stopping[order[: max(1, round(STOP_SHARE * len(documents)))]] = True
    apart = stopping[places] if len(documents) else torch.zeros(0, dtype=torch.bool)
    return train[~apart], train[apart]


def _part(name: Name, expert: Expert, x: Tensor) -> Part:
    x = x.to(expert.down.device, torch.float32)
    y = expert(x.to(expert.down.dtype)).float()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise LamellaError(
            f"Expert {name[1]} of layer {name[0]} has an input or output that is not finite. Run the model in float32 "
            "or bfloat16, find the text that does this, and capture again."
        )
    return Part(x, y)
