"""Perplexity of a changed model against the model before, document by document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from lamella.errors import LamellaError
from lamella.lab.runs.metrics import perplexity
from lamella.similarity.swapping.intervals import ratio_interval
from lamella.similarity.swapping.scores import Batch, TextScores, text_scores

Domains = Mapping[str, Iterable[Batch]]


def read_domains(batches_by_domain: Domains) -> dict[str, list[Batch]]:
    """The batches of each domain, held so that every model sees them.

    Raises:
        LamellaError: there is no domain, or one without batches.
    """
    read = {domain: list(batches) for domain, batches in batches_by_domain.items()}
    if not read or not all(read.values()):
        empty = next((domain for domain, batches in read.items() if not batches), None)
        raise LamellaError(
            "There is no text to measure perplexity on"
            + ("" if empty is None else f" in the domain {empty}")
            + "; give at least one batch for each domain."
        )
    return read


def score(model: nn.Module, domains: Mapping[str, list[Batch]]) -> dict[str, TextScores]:
    """Nats and predicted tokens of every document, by domain."""
    return {domain: text_scores(model, batches, "nll") for domain, batches in domains.items()}


def compare(before: TextScores, after: TextScores, seed: int) -> dict[str, float]:
    """perplexity, baseline (the model before), ratio, and low and high of the ratio, 95 %, paired over documents."""
    interval = ratio_interval(after.sums - before.sums, after.weights, seed=seed)
    tokens = int(after.weights.sum())
    return {
        "perplexity": perplexity(float(after.sums.sum()), tokens),
        "baseline": perplexity(float(before.sums.sum()), tokens),
        "ratio": math.exp(interval.difference),
        "low": math.exp(interval.low),
        "high": math.exp(interval.high),
    }
