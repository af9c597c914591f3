"""The screen: one row per ordered pair of experts, without training anything."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lamella.backbones.moe import Expert, MoELayer, moe_layers
from lamella.backbones.offloading import onloaded
from lamella.errors import LamellaError, optional_module
from lamella.progress import working
from lamella.similarity.matching import weight_distance
from lamella.similarity.pairs import NAMES, Name, Pair, all_pairs, check_pairs
from lamella.similarity.screening.measures import (
    centred,
    floor_energy,
    linear_cka,
    unreachable_directions,
)
from lamella.similarity.screening.prediction import Training, outputs, predicted_energy, stiffness

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture

logger = logging.getLogger("lamella")

MEASURES = ("predicted", "floor", "cka_distance", "weight_distance", "coactivation")
QUICK_MEASURES = ("floor", "cka_distance")
MOST_PAIRS = 20_000  # of which all measures are taken unasked
_ROWS = 32768  # tokens of sources held at once; the down-projection of each target is decomposed once for each group


def default_measures(pairs: int) -> list[str]:
    """The measures of a screen that are taken unasked: of many pairs those that take long are not."""
    return list(MEASURES if pairs <= MOST_PAIRS else QUICK_MEASURES)


@torch.no_grad()
def screen(
    capture: Capture,
    model: nn.Module,
    pairs: Iterable[Pair] | None = None,
    *,
    measures: Collection[str] = MEASURES,
    held_out: float = 0.5,
) -> pd.DataFrame:
    """What tells pairs of experts apart before any aligner is trained, on the held-out tokens of each source.

    Args:
        capture: inputs of the experts.
        model: the captured model.
        pairs: (source, target), each a (layer, expert); None takes all ordered pairs of captured experts.
        measures: which columns to compute; the others are NaN. The weight distance costs most.
        held_out: share of the source's documents to measure on, as for `align`.

    Returns:
        One row per pair, sorted, with source_layer, source_expert, target_layer, target_expert and

        * predicted: the normalised error that a trained linear aligner is expected to leave (see `predicted_energy`);
        * floor: a normalised error that no aligner in front of the target can beat on these tokens: the share of the
          source's output that lies outside the column space of the target's down-projection (less its bias), over
          the same variance as every normalised error. 0 where the target has as many hidden units as outputs;
        * cka_distance: 1 - linear CKA of both experts' outputs on the source's tokens;
        * weight_distance: of the weights, hidden units matched (see `weight_distance`);
        * coactivation: share of tokens that choose both; NaN across layers;
        * held_out: tokens of the source that predicted, floor and cka_distance were measured on.

        Predicted, floor and CKA distance are NaN for a source with fewer than two such tokens or an output that does
        not vary; a warning names these sources.

    Raises:
        LamellaError: the capture is of another model, a pair or a measure is unknown, or an activation is not finite.
    """
    pd = optional_module("pandas", "A screen of pairs")

    if unknown := sorted(set(measures) - set(MEASURES)):
        raise LamellaError(f"{unknown[0]!r} is not a measure of the screen; choose among {', '.join(MEASURES)}.")
    capture.check(model)
    layers = {layer.index: layer for layer in moe_layers(model)}
    ordered = all_pairs(capture.experts) if pairs is None else check_pairs(pairs, capture.experts)
    frame = pd.DataFrame([(*source, *target) for source, target in ordered], columns=NAMES, dtype="int64")
    columns = {name: [float("nan")] * len(ordered) for name in MEASURES}
    place = {pair: row for row, pair in enumerate(ordered)}
    tokens = _measure_outputs(capture, layers, place, columns, measures, held_out)
    if "weight_distance" in measures:
        _measure_weights(layers, place, columns["weight_distance"])
    if "coactivation" in measures:
        _read_coactivation(capture, ordered, columns["coactivation"])
    return frame.assign(**columns, held_out=[tokens[source] for source, _ in ordered])


@dataclass(frozen=True, eq=False)
class _Sources:
    """Some sources with their held-out tokens, padded to the same number n.

    Attributes:
        names: S of them.
        x: ``(S, n, h)``.
        y: outputs of the sources, ``(S, n, d)``, zero where padded.
        real: not padded, ``(S, n, 1)``.
        scale: tokens x d x variance: what turns a squared error into a normalised one, ``(S,)``; NaN where it cannot.
        training: the tokens that aligners are trained on; None where no measure asks for them.
        fit: of ``training``, ``(S, n, m)``.
    """

    names: list[Name]
    x: Tensor
    y: Tensor
    real: Tensor
    scale: Tensor
    training: Training | None = None
    fit: Tensor | None = None

    def only(self, names: Collection[Name]) -> _Sources:
        """These alone; all of them where that saves no more than half."""
        if 2 * len(names) > len(self.names):
            return self
        rows = [row for row, name in enumerate(self.names) if name in names]
        return _Sources(
            [self.names[row] for row in rows], self.x[rows], self.y[rows], self.real[rows], self.scale[rows],
            None if self.training is None else self.training[rows], None if self.fit is None else self.fit[rows],
        )  # fmt: skip


def _measure_outputs(
    capture: Capture,
    layers: dict[int, MoELayer],
    place: dict[Pair, int],
    columns: dict[str, list[float]],
    measures: Collection[str],
    share: float,
) -> dict[Name, int]:
    """Fills in what is of outputs; the number of held-out tokens of each source."""
    known = {"predicted": _predictions, "floor": _floors, "cka_distance": _cka_distances}
    chosen = {name: measure for name, measure in known.items() if name in measures}
    wanted: dict[Name, set[Name]] = {}
    for source, target in place:
        wanted.setdefault(target, set()).add(source)
    asked = {source for source, _ in place}
    parts = {name: capture.split(*name, held_out=share) for name in asked}
    tokens = {source: len(held_out) for source, (_, held_out) in parts.items()}
    groups = list(_groups(tokens))
    with working("comparing outputs", len(groups) * len(wanted), "replacements") as work:
        for group in groups:
            sources = _read(capture, layers, {name: parts[name][1] for name in group})
            if "predicted" in chosen:
                sources = _with_training(sources, capture, layers, {name: parts[name][0] for name in group})
            for target, expert in _opened(layers, wanted):
                if here := wanted[target] & set(group):
                    some = sources.only(here)
                    for name, measure in chosen.items():
                        values = dict(zip(some.names, measure(some, expert).tolist(), strict=True))
                        for source in here:
                            columns[name][place[source, target]] = values[source]
                work.advance()
    return tokens


def _opened(layers: dict[int, MoELayer], names: Iterable[Name]) -> Iterator[tuple[Name, Expert]]:
    """Experts by name, sorted; where weights are kept elsewhere, those of a layer are read once for all of its own."""
    for index, of_layer in groupby(sorted(names), key=lambda name: name[0]):
        with onloaded(*layers[index].experts_module.modules()):
            for name in of_layer:
                yield name, layers[index].experts[name[1]]


def _predictions(sources: _Sources, target: Expert) -> Tensor:
    assert sources.training is not None
    assert sources.fit is not None
    energy = predicted_energy(sources.training, sources.fit, sources.x, sources.y, target)  # (S, n)
    return (energy * sources.real[..., 0]).sum(-1) / sources.scale  # (S,)


def _floors(sources: _Sources, target: Expert) -> Tensor:
    energy = floor_energy(sources.y, target, unreachable_directions(target.down))  # (S, n)
    return (energy * sources.real[..., 0]).sum(-1) / sources.scale  # (S,)


def _cka_distances(sources: _Sources, target: Expert) -> Tensor:
    others = outputs(target, sources.x)  # (S, n, d)
    distance = 1 - linear_cka(centred(sources.y, sources.real), centred(others, sources.real))
    return distance.masked_fill(sources.scale.isnan(), torch.nan)


def _groups(tokens: dict[Name, int]) -> Iterator[list[Name]]:
    """The sources in groups of at most `_ROWS` padded tokens."""
    group: list[Name] = []
    for name in sorted(tokens):
        longest = max([tokens[name], *(tokens[other] for other in group)])
        if group and longest * (len(group) + 1) > _ROWS:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _read(capture: Capture, layers: dict[int, MoELayer], held_out: dict[Name, Tensor]) -> _Sources:
    xs, ys = _tokens(capture, layers, held_out)
    scale = torch.stack([_scale(y) for y in ys])
    if bad := [name for name, one in zip(held_out, scale.tolist(), strict=True) if one != one]:
        logger.warning(
            "Not measured as sources, for want of two held-out tokens with different outputs: %s.",
            ", ".join(f"expert {index} of layer {layer}" for layer, index in bad),
        )
    return _Sources(list(held_out), *_padded(xs, ys), scale)


def _with_training(
    sources: _Sources, capture: Capture, layers: dict[int, MoELayer], train: dict[Name, Tensor]
) -> _Sources:
    stiff = torch.stack([stiffness(expert) for _, expert in _opened(layers, train)])
    training = Training(*_padded(*_tokens(capture, layers, train)), stiff)
    return replace(sources, training=training, fit=training.fit(sources.x))


def _tokens(
    capture: Capture, layers: dict[int, MoELayer], rows: dict[Name, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Some of each source's inputs ``(n, h)``, and what it puts out for them ``(n, d)``."""
    xs, ys = [], []
    for (layer, index), expert in _opened(layers, rows):
        x = capture.inputs(layer, index)[rows[layer, index]].to(expert.down.device)  # (n, h)
        y = outputs(expert, x)  # (n, d)
        if not (x.isfinite().all() and y.isfinite().all()):
            raise LamellaError(
                f"Expert {index} of layer {layer} has an input or output that is not finite. Run the model in float32 "
                "or bfloat16, find the text that does this, and capture again."
            )
        xs.append(x.float())
        ys.append(y)
    return xs, ys


def _padded(xs: list[Tensor], ys: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of all sources, and which are real, ``(S, n, .)``."""
    real = [x.new_ones(len(x), 1, dtype=torch.bool) for x in xs]
    x, y, marks = (torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (xs, ys, real))
    return x, y, marks


def _scale(y: Tensor) -> Tensor:
    energy = (y - y.mean(0)).square().sum()
    return energy if len(y) > 1 and energy > 0 else torch.full_like(energy, torch.nan)


def _measure_weights(layers: dict[int, MoELayer], place: dict[Pair, int], column: list[float]) -> None:
    by_layers = sorted(place, key=lambda pair: (pair[0][0], pair[1][0]))
    apart = {frozenset(pair) for pair in place}
    with working("comparing weights", len(apart), "pairs") as work:
        for (first, second), pairs in groupby(by_layers, key=lambda pair: (pair[0][0], pair[1][0])):
            modules = {one for layer in (first, second) for one in layers[layer].experts_module.modules()}
            with onloaded(*modules):
                for source, target in pairs:
                    found = column[place[target, source]] if (target, source) in place else math.nan  # it is symmetric
                    if math.isnan(found):
                        found = weight_distance(*(layers[layer].experts[index] for layer, index in (source, target)))
                        work.advance()
                    column[place[source, target]] = found


def _read_coactivation(capture: Capture, pairs: Sequence[Pair], column: list[float]) -> None:
    told = capture.coactivation[["layer", "expert", "other", "share"]].itertuples(index=False, name=None)
    shares = {(layer, expert, other): share for layer, expert, other, share in told}
    for row, (source, target) in enumerate(pairs):
        if source[0] == target[0]:
            column[row] = shares[(*source, target[1])]
