"""Experts merged, or replaced by one another, until they store no more than a budget."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lamella.backbones.moe import MoELayer, moe_layers
from lamella.backbones.moe.expert import OFFLOADED, NormedExpert
from lamella.backbones.offloading import is_offloaded
from lamella.errors import LamellaError, optional_module
from lamella.similarity.compression.grouping import (
    METHODS,
    Aligners,
    Method,
    Settings,
    choose,
    is_used,
    train_aligners,
)
from lamella.similarity.compression.pool import PooledExperts, StoredExpert, expert_parameters, replacement
from lamella.similarity.compression.rerouting import native_layers
from lamella.similarity.matching import average
from lamella.similarity.pairs import Name

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture


@dataclass(frozen=True, eq=False)
class Compressed:
    """A model with fewer stored experts, and what was done to it.

    Attributes:
        model: routes as before; experts of one group are one stored expert (see ``PooledExperts``).
        report: what was grouped, and what is left.
    """

    model: PreTrainedModel
    report: Report

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Writes model and report to a new folder, atomically; what experts share is written once.

        Only ``Compressed.load`` opens it: ``from_pretrained``, which knows no shared experts, finds no weights there.

        Args:
            folder: that is not there yet.
            tokenizer: of the model, to lie beside it.

        Raises:
            LamellaError: the folder exists, or transformers has no class of the model's name to load it by.
        """
        from lamella.similarity.compression.saving import save

        save(self.model, self.report, Path(folder), tokenizer)

    @classmethod
    def load(cls, folder: str | Path) -> Compressed:
        """The model and the report that ``save`` wrote, equal bit for bit, in evaluation mode.

        Raises:
            LamellaError: the folder holds no compressed model, or its files do not belong together.
        """
        from lamella.similarity.compression.saving import load

        return cls(*load(Path(folder)))


def compress(
    model: PreTrainedModel,
    similarity: pd.DataFrame | None,
    budget: float,
    *,
    method: Method = "similarity",
    merge: bool = True,
    aligner: Aligners | None = None,
    across_layers: bool = False,
    measure: str | None = None,
    capture: Capture | None = None,
    seed: int = 0,
) -> Compressed:
    """Lets the experts of a copy of the model share storage until they hold ``budget`` of their parameters.

    The two closest groups of experts are joined again and again, over all layers alike: by the mean of their members'
    distances (average linkage), or, by usage, the least used expert of all joins the most used one of its layer. So
    layers may keep different numbers of experts, each at least one. The routers stay as they are: a token whose k
    experts are now fewer gets the one that stands for several once, with the sum of their weights, as in M-SMoE.

    Args:
        model: left as it is.
        similarity: a table of ordered pairs from ``align`` or ``screen``; needed by the method "similarity". Pairs that
            it lacks never come together, but for experts that no token of the capture went to: whoever takes their
            place, it costs nothing.
        budget: share of the experts' parameters to keep at most, 0 < budget <= 1; 1 changes nothing.
        method: "similarity" by the table, or the baselines: "weight-distance" by the weights alone (hidden units
            matched), "usage" by the router's counts, "random" by random distances.
        merge: whether a group becomes the average of its experts, hidden units matched to those of the expert that
            the others are closest to; or that expert alone.
        aligner: trains the aligners of the pairs (source, target) that it is given, as
            ``partial(fit_aligners, capture, model)`` does; with ``merge=False`` a replaced expert is its replacement
            behind its aligner, whose storage counts. All must be of one size. An expert without tokens needs none.
        across_layers: whether experts of two neighbouring layers may share one stored expert.
        measure: column of ``similarity``; by default "identity_nmse" (without aligner), "nmse" (with), or
            "cka_distance" where the table is a screen. Of two directions the better one counts.
        capture: of this model; by its counts a distance is weighted by the usage of the replaced expert (but for the
            method "random"), averages are weighted, and the method "usage" decides.
        seed: of the method "random".

    Raises:
        LamellaError: the budget lies outside 0 to 1 or cannot be reached, an argument that the method needs is missing,
            the table is about other experts or holds NaN, or the model has no experts of its own.

    Sources: Li et al. 2024, arXiv 2310.01334 (M-SMoE); Chen et al. 2025, arXiv 2410.08589 (HC-SMoE).
    """
    settings = Settings(method, merge, aligner, across_layers, measure, capture, seed)
    (compressed,) = compress_each(model, similarity, [budget], settings)
    return compressed


def compress_each(
    model: PreTrainedModel,
    similarity: pd.DataFrame | None,
    budgets: Sequence[float],
    settings: Settings,
) -> Iterator[Compressed]:
    """``compress`` to each budget, one after the other; what is the same for all is computed once."""
    check_arguments(budgets, settings)
    layers = _whole_layers(model)
    if settings.capture is not None:
        settings.capture.check(model)
    keys = [(layer.index, expert) for layer in layers for expert in range(layer.num_experts)]
    choice = choose(layers, keys, similarity, settings)
    # all of them first: a budget out of reach is refused before the first model
    for budget, groups in [(budget, choice.groups(budget)) for budget in budgets]:
        with torch.no_grad():
            small = _with_pools(model, layers, _store(layers, groups, settings))
        report = Report(
            method=settings.method,
            budget=budget,
            seed=settings.seed,
            merged=settings.merge,
            across_layers=settings.across_layers,
            measure=choice.measure,
            weighted_by_usage=settings.shares is not None,
            experts=len(keys),
            experts_left=len(groups),
            expert_parameters_before=expert_parameters(layers),
            expert_parameters=expert_parameters(moe_layers(small)),
            parameters_before=_count(model),
            parameters=_count(small),
            groups=tuple(tuple(group) for group in groups),
        )
        yield Compressed(small, report)


def check_arguments(budgets: Sequence[float], settings: Settings) -> None:
    """What can be refused before anything is computed.

    Raises:
        LamellaError: a budget outside 0 to 1, an unknown method, or an aligner for merged experts.
    """
    if wrong := [budget for budget in budgets if not 0 < budget <= 1]:
        raise LamellaError(
            f"budget={wrong[0]} is not a share of the experts' parameters to keep; give 0 < budget <= 1."
        )
    if settings.method not in METHODS:
        raise LamellaError(f"method={settings.method!r} is not one of {', '.join(METHODS)}.")
    if settings.merge and settings.aligner is not None:
        raise LamellaError(
            "An aligner was trained for an expert as it is, not for an average; give merge=False with it."
        )


def _whole_layers(model: nn.Module) -> list[MoELayer]:
    """The layers, if their experts are all that their modules hold."""
    layers = list(native_layers(model).values())
    for layer in layers:
        if not layer.family.pools or isinstance(layer.experts[0], NormedExpert):
            raise LamellaError(
                f"The experts of layer {layer.index} ({layer.name}) are given tokens, or give theirs out, by more than "
                "a router's weights, so they cannot be stored as fewer."
            )
        if any(map(is_offloaded, layer.module.modules())):
            raise LamellaError(f"Weights of {layer.name} are offloaded by accelerate, {OFFLOADED}")
        if isinstance(layer.experts_module, PooledExperts):
            raise LamellaError(f"The experts of layer {layer.index} are compressed already; compress the first model.")
        if sum(expert.parameters for expert in layer.experts) != expert_parameters([layer]):
            raise LamellaError(
                f"The experts of layer {layer.index} ({layer.name}) are not all that their module holds; "
                "take what was put into it (an adapter, say) out before compressing."
            )
    return layers


def _store(
    layers: Sequence[MoELayer],
    groups: Sequence[Sequence[Name]],
    settings: Settings,
) -> dict[Name, nn.Module]:
    """What does the work of each expert in the layers where any of them came together with another."""
    shares = settings.shares
    by_index = {layer.index: layer for layer in layers}
    changed = {layer for group in groups if len(group) > 1 for layer, _ in group}
    places: dict[Name, nn.Module] = {}
    pairs = [(source, group[0]) for group in groups for source in group[1:] if is_used(source, shares)]
    trained = {} if settings.aligner is None else train_aligners(settings.aligner, pairs)
    for group in groups:
        if group[0][0] not in changed:
            continue
        experts = [by_index[layer].experts[expert] for layer, expert in group]
        if settings.merge:
            stored = StoredExpert.copy_of(average(experts, [1.0 if shares is None else shares[key] for key in group]))
        else:
            stored = StoredExpert.copy_of(experts[0])
        places[group[0]] = stored
        for source in group[1:]:
            fitted = trained.get((source, group[0]))
            places[source] = stored if fitted is None else replacement(stored, fitted)
    return places


def _with_pools(
    model: PreTrainedModel, layers: Sequence[MoELayer], places: Mapping[Name, nn.Module]
) -> PreTrainedModel:
    """A copy of the model with pools in the places of the changed layers' experts, which are not copied."""
    pools: dict[int, Any] = {}
    for layer in layers:
        experts = [places[layer.index, e] for e in range(layer.num_experts) if (layer.index, e) in places]
        if experts:
            stored = list({id(one): one for one in experts}.values())
            at = {id(one): place for place, one in enumerate(stored)}
            index = torch.tensor([at[id(one)] for one in experts], device=layer.experts[0].down.device)
            pools[id(layer.experts_module)] = PooledExperts(stored, index, layer.family.chosen)
    return copy.deepcopy(model, pools)  # deepcopy takes what the memo holds for an object in that object's place


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Report:
    """What a compression grouped, and what is left.

    Attributes:
        method, budget, seed, merged, across_layers: as ``compress`` was called.
        measure: the column of the table that decided; None for a baseline.
        weighted_by_usage: whether averages, and all distances but random ones, were weighted by the routers' counts.
        experts: how many the routers choose from.
        experts_left: how many groups they are in; each is stored once, beside the aligners of its replacements.
        expert_parameters_before, expert_parameters: numbers that the experts store, aligners included.
        parameters_before, parameters: numbers that the whole model stores.
        groups: the experts of each group as (layer, expert), first the one that stands for all.
    """

    method: str
    budget: float
    seed: int
    merged: bool
    across_layers: bool
    measure: str | None
    weighted_by_usage: bool
    experts: int
    experts_left: int
    expert_parameters_before: int
    expert_parameters: int
    parameters_before: int
    parameters: int
    groups: tuple[tuple[Name, ...], ...]

    @property
    def kept(self) -> float:
        """Share of the experts' parameters that is still stored."""
        return self.expert_parameters / self.expert_parameters_before

    @property
    def frame(self) -> pd.DataFrame:
        """One row per expert: layer, expert, group, and the layer and expert that stand for it."""
        pd = optional_module("pandas", "A table of groups")

        rows = [(*key, at, *group[0]) for at, group in enumerate(self.groups) for key in group]
        columns = ["layer", "expert", "group", "by_layer", "by_expert"]
        return pd.DataFrame(rows, columns=columns).sort_values(["layer", "expert"], ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, written: dict[str, Any]) -> Report:
        """From what ``to_dict`` gave, also after JSON made lists of its tuples."""
        groups = tuple(tuple((int(layer), int(expert)) for layer, expert in group) for group in written["groups"])
        return cls(**{**written, "groups": groups})

    def __str__(self) -> str:
        how = "merged" if self.merged else "replaced"
        return (
            f"{self.experts} experts {how} into {self.experts_left} by {self.method}: {self.expert_parameters:,} of "
            f"{self.expert_parameters_before:,} expert parameters stored ({self.kept:.1%}), {self.parameters:,} of "
            f"{self.parameters_before:,} in the whole model"
        )
