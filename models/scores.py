"""How well a language model predicts text that it was not made from, beside floors, and how its routers use experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lamella.routing import balance_loss
from models.fitting import Columns

_ROWS = 16  # of a forward pass; the logits of a large vocabulary take more memory than all else


def model_nll(model: PreTrainedModel, columns: Columns) -> Tensor:
    """Negative log-probability of all labels but each row's first: ``(B, T-1)``, in nats."""
    rows = [
        functional.cross_entropy(outputs.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
        for outputs, labels in _outputs(model, columns)
    ]
    return torch.cat(rows)


def perplexities(nll: Mapping[str, Tensor]) -> dict[str, float]:
    """exp of the mean over tokens, by kind of prose and, as ``all``, over the tokens of every kind."""
    by_kind = {kind: math.exp(values.double().mean()) for kind, values in nll.items()}
    return {"all": math.exp(torch.cat([values.double().flatten() for values in nll.values()]).mean()), **by_kind}


def expert_shares(model: PreTrainedModel, columns: Columns, top_k: int) -> list[list[float]]:
    """For each layer with experts, the share of all top-k choices that falls on each expert; every token is real."""
    counts: Any = 0
    for outputs, _ in _outputs(model, columns, output_router_logits=True):
        counts = counts + torch.stack([_choices(logits, top_k) for logits in outputs.router_logits])  # (L, E)
    return (counts / counts.sum(dim=1, keepdim=True)).tolist()


def smallest(shares: Iterable[Sequence[float]]) -> float:
    """The least share of any expert in any layer."""
    return min(min(layer) for layer in shares)


def routers_balance(router_logits: Iterable[Tensor], top_k: int) -> Tensor:
    """The balance losses of all routers, each by itself, summed; ``(N, E)`` logits of real tokens each.

    transformers' loss is of all layers' tokens together: there, layers that have collapsed on different experts
    look balanced.
    """
    losses = [balance_loss(logits, logits.topk(top_k, dim=-1).indices) for logits in router_logits]
    return torch.stack(losses).sum()


@torch.no_grad()
def _outputs(model: PreTrainedModel, columns: Columns, **wanted: bool) -> Iterator[tuple[Any, Tensor]]:
    """The model's outputs for some rows at a time, beside their labels."""
    training = model.training
    model.eval()
    inputs = {name: column.split(_ROWS) for name, column in columns.items() if name != "labels"}
    for index, labels in enumerate(columns["labels"].split(_ROWS)):
        yield model(**{name: parts[index] for name, parts in inputs.items()}, use_cache=False, **wanted), labels
    model.train(training)


def _choices(logits: Tensor, top_k: int) -> Tensor:
    """How often each expert is among the top k, ``(E,)``."""
    return torch.bincount(logits.topk(top_k, dim=-1).indices.flatten(), minlength=logits.shape[-1]).double()


@dataclass(frozen=True)
class Bigrams:
    """What a model has to beat: how often a token occurs, and how often it follows the one before.

    Attributes:
        single: how often each token occurs, ``(V,)``.
        pairs: how often the second follows the first, ``(V, V)``.
    """

    single: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, blocks: Tensor, vocabulary: int) -> Bigrams:
        """Counted in ``blocks``, ``(B, T)``; a pair never spans two blocks."""
        flat = blocks[:, :-1] * vocabulary + blocks[:, 1:]  # (B, T-1)
        pairs = torch.bincount(flat.flatten(), minlength=vocabulary**2).view(vocabulary, vocabulary)
        return cls(torch.bincount(blocks.flatten(), minlength=vocabulary).double(), pairs.double())

    def unigram_nll(self, blocks: Tensor) -> Tensor:
        """Negative log-probability of all tokens but a block's first by their frequency, each seen once more."""
        return -self._unigram().log()[blocks[:, 1:]]  # (B, T-1)

    def bigram_nll(self, blocks: Tensor) -> Tensor:
        """The same by the token before, interpolated with the frequencies.

        Witten and Bell's weights: after a token that was followed by n tokens, t of them different, the pair's
        frequency counts n / (n + t). No weight has to be chosen. Source: Chen & Goodman 1999, section 2.6.
        """
        before, after = blocks[:, :-1], blocks[:, 1:]
        followed = self.pairs.sum(dim=1)[before]  # (B, T-1)
        different = (self.pairs > 0).sum(dim=1)[before].clamp_min(1)
        probability = (self.pairs[before, after] + different * self._unigram()[after]) / (followed + different)
        return -probability.log()

    def _unigram(self) -> Tensor:
        return (self.single + 1) / (self.single + 1).sum()
