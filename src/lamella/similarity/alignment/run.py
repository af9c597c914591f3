"""Alignment: which expert, behind a trained aligner, can do what another does on that one's own tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lamella.aligners import Aligner
from lamella.backbones.moe import Expert, MoELayer, moe_layers
from lamella.backbones.offloading import onloaded
from lamella.errors import LamellaError
from lamella.similarity.alignment.controls import random_expert
from lamella.similarity.alignment.fitting import Fitted, Job, Settings, fit
from lamella.similarity.alignment.pull import Pull
from lamella.similarity.alignment.sources import Source, read_source
from lamella.similarity.alignment.stack import unstack
from lamella.similarity.alignment.table import RANDOM, rows_of, table_of
from lamella.similarity.pairs import Name, Pair, all_pairs, check_pairs

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture

logger = logging.getLogger("lamella")

STEPS, LR = 200, 3e-3


def align(
    capture: Capture,
    model: nn.Module,
    pairs: Iterable[Pair] | None = None,
    aligner: str = "linear",
    seed: int = 0,
    *,
    steps: int = STEPS,
    lr: float = LR,
    rank: int | None = None,
    held_out: float = 0.5,
    controls: bool = True,
    pull: Pull | Literal["mmd", "kl"] | None = None,
    score_on: Capture | None = None,
) -> pd.DataFrame:
    """Trains an aligner for every ordered pair of experts and scores it on tokens of other documents.

    For a pair (source, target) it looks for A with target(A(x)) ≈ source(x) on the tokens x that went to the source.
    Each source's documents are in three parts: to train on, to stop by (the state that was best there is kept), and
    held out. The loss is the published one, the mean over elements of the squared error, over the source's variance on
    its training tokens, so that one step size serves all sources. Every number without "train" is of held-out tokens.

    Args:
        capture: inputs of the experts.
        model: the captured model; nothing in it changes.
        pairs: (source, target), each a (layer, expert); None takes all ordered pairs of captured experts.
        aligner: "linear", "layernorm", "low-rank", "identity" or "published".
        seed: of the documents to stop by, of the aligners' start and of the random experts, the last two together with
            the pair: a pair's row is the same whatever else is asked for. Held-out documents are the same for every
            seed, and so is the start of a linear or layernorm aligner: a multiple of the identity.
        steps: of full-batch Adam, at most.
        lr: its step size.
        rank: of low-rank aligners; an eighth of the hidden size unless given.
        held_out: share of the documents.
        controls: also each source with itself and with a random expert (kinds "self" and "random-target").
        pull: of A(x) towards the target's inputs, added to the loss; a random target has none.
        score_on: a capture of other text by the same model, whose held-out documents are scored instead.

    Returns:
        A row per pair, with the columns `COLUMNS`: names, kind, aligner, seed; ``samples`` and ``held_out`` tokens;
        ``steps`` that led to the state kept; ``parameters`` of the aligner and ``samples_per_parameter``: numbers that
        the samples tell, each as many as the expert has outputs, for each of them; ``mse`` mean over elements; ``nmse``
        = mse / ``source_variance`` (mean over elements of (y − mean y)², held out); ``cosine`` mean over tokens;
        ``train_nmse``; the nmse of the target without aligner (``identity_nmse``) and of the mean of the training
        outputs (``mean_nmse``); and ``over_mean``, ``over_identity``, ``over_random``: upper ends of the 95 %
        intervals, over documents, of nmse less that control's. ``attrs["notes"]`` names experts that were no source
        for want of samples; they are targets still.

    Raises:
        LamellaError: a capture of another model, an unknown pair or setting, experts of different shapes in a pair,
            activations that are not finite, or no source left.

    Source: Alisetti & Kumar, MoE Align: Quantifying Expert Similarity Across Transformer Layers (aligner "published"),
    with held-out scores.
    """
    settings = Settings.checked(aligner, capture.hidden_size, seed, steps, lr, rank, _pull(pull))
    plan = _plan(capture, model, pairs, held_out, score_on, seed)
    rows, random_errors = [], {}
    for fitted in plan.random_fits(settings) if controls else ():
        source = fitted.sources[0]
        random_errors[source.name] = source.by_document(fitted.errors[0])
        rows += rows_of(fitted, settings, {})
    for fitted in plan.fits(settings, selves=controls):
        rows += rows_of(fitted, settings, random_errors)
    frame = table_of(rows)
    frame.attrs["notes"] = plan.notes
    return frame


def fit_aligners(
    capture: Capture,
    model: nn.Module,
    pairs: Iterable[Pair],
    aligner: str = "linear",
    seed: int = 0,
    *,
    steps: int = STEPS,
    lr: float = LR,
    rank: int | None = None,
    held_out: float = 0.5,
    pull: Pull | Literal["mmd", "kl"] | None = None,
) -> dict[Pair, Aligner]:
    """The trained aligners themselves, on the CPU: those that `align` scores with the same arguments.

    A pair whose source has too few samples has none; a warning names it.

    Raises:
        LamellaError: as `align`.
    """
    settings = Settings.checked(aligner, capture.hidden_size, seed, steps, lr, rank, _pull(pull))
    plan = _plan(capture, model, pairs, held_out, None, seed)
    return {
        (source.name, fitted.target): unstack(
            settings.kind, fitted.trained.parameters, at, settings.hidden_size, settings.rank
        )
        for fitted in plan.fits(settings, selves=False)
        for at, source in enumerate(fitted.sources)
    }


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is to be trained: sources with tokens, experts, and who is to replace whom."""

    capture: Capture
    experts: dict[Name, Expert]
    sources: dict[Name, Source]
    pairs: Sequence[Pair]
    notes: list[str]

    def random_fits(self, settings: Settings) -> Iterator[Fitted]:
        """Every source before a random expert of its own."""
        for name, source in self.sources.items():
            expert = random_expert(self.experts[name], name, settings.seed)
            yield from fit(Job(RANDOM, expert, [source]), settings)

    def fits(self, settings: Settings, selves: bool) -> Iterator[Fitted]:
        """Every pair, and every source before itself if ``selves``."""
        pairs = {*self.pairs, *((name, name) for name in self.sources if selves)}
        for target in sorted({target for _, target in pairs}):
            sources = [one for name, one in self.sources.items() if (name, target) in pairs]
            inputs = None if settings.pull is None else self._inputs(target)
            if sources:
                yield from fit(Job(target, self.experts[target], sources, inputs), settings)

    def _inputs(self, target: Name) -> Tensor:
        inputs = self.capture.inputs(*target)
        if len(inputs) < 2:
            raise LamellaError(
                f"Expert {target[1]} of layer {target[0]} has {len(inputs)} captured inputs, too few to pull towards; "
                "capture more text, leave its pairs out, or align without a pull."
            )
        return inputs.to(self.experts[target].down.device, torch.float32)


def _plan(
    capture: Capture,
    model: nn.Module,
    pairs: Iterable[Pair] | None,
    held_out: float,
    score_on: Capture | None,
    seed: int,
) -> _Plan:
    for one in (capture, score_on):
        if one is not None:
            one.check(model)
    chosen = all_pairs(capture.experts) if pairs is None else check_pairs(pairs, capture.experts)
    if not chosen:
        raise LamellaError("There is no pair to align; name at least one, or None for all.")
    layers = {layer.index: layer for layer in moe_layers(model)}
    experts = _read(layers, {name for pair in chosen for name in pair})
    _check_shapes(chosen, experts)
    read = {
        name: read_source(capture, name, experts[name], held_out, score_on, seed)
        for name in sorted({source for source, _ in chosen})
    }
    notes = [one for one in read.values() if isinstance(one, str)]
    sources = {name: one for name, one in read.items() if isinstance(one, Source)}
    if notes:
        logger.warning("Not aligned as sources: %s.", "; ".join(notes))
    if not sources:
        raise LamellaError(f"No expert can be aligned: {'; '.join(notes)}. Capture more text, or of more documents.")
    return _Plan(capture, experts, sources, chosen, notes)


def _read(layers: dict[int, MoELayer], names: Iterable[Name]) -> dict[Name, Expert]:
    """Experts by name; where weights are kept elsewhere, those of a layer are read once, and are in memory from now."""
    experts: dict[Name, Expert] = {}
    for index, of_layer in groupby(sorted(names), key=lambda name: name[0]):
        with onloaded(*layers[index].experts_module.modules()):
            experts |= {name: layers[index].experts[name[1]] for name in of_layer}
    return experts


def _check_shapes(pairs: Sequence[Pair], experts: dict[Name, Expert]) -> None:
    for source, target in pairs:
        shapes = [(experts[name].up.shape[1], experts[name].down.shape[0]) for name in (source, target)]
        if shapes[0] != shapes[1]:
            raise LamellaError(
                f"Expert {target[1]} of layer {target[0]} maps {shapes[1][0]} features to {shapes[1][1]} and cannot "
                f"replace expert {source[1]} of layer {source[0]}, which maps {shapes[0][0]} to {shapes[0][1]}; "
                "leave the pair out."
            )


def _pull(pull: Pull | Literal["mmd", "kl"] | None) -> Pull | None:
    return Pull(pull) if isinstance(pull, str) else pull
