"""A model with fewer experts, and what was done to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lamella.backbones.modes import evaluating
from lamella.backbones.moe import MoELayer, moe_layers
from lamella.backbones.moe.expert import OFFLOADED, NormedExpert
from lamella.backbones.offloading import is_offloaded
from lamella.compiling import uncompiled
from lamella.errors import LamellaError, optional_module
from lamella.similarity.activations.manifest import model_fingerprint
from lamella.similarity.compression.budget import Scope, check_budget, experts_to_go
from lamella.similarity.compression.calibration import LayerSample, layer_gradients
from lamella.similarity.compression.criteria import Criterion, Ranking, find_criterion
from lamella.similarity.compression.distillation import distil_routers
from lamella.similarity.compression.pool import PooledExperts, StoredExpert, constant_expert, expert_parameters
from lamella.similarity.compression.refit import refit as refit_layer
from lamella.similarity.compression.removal import without_experts
from lamella.similarity.compression.routes import native_layers
from lamella.similarity.matching import average
from lamella.similarity.pairs import Name
from lamella.similarity.swapping.scores import Batch

if TYPE_CHECKING:
    import pandas as pd

    from lamella.similarity.activations import Capture

DEFAULT = "reap"  # over the model; chosen on validation documents (docs/evidence/compression-criteria.md)


@dataclass(frozen=True)
class Settings:
    """How experts are chosen and what is done after; see the arguments of ``compress``."""

    criterion: str = DEFAULT
    scope: Scope = "model"
    weighted: bool = True
    refit: bool = True
    distil: int | None = None
    seed: int = 0

    def with_passes(self, texts: Sequence[Batch] | None) -> Settings:
        """The same, with the passes of the distillation that None stands for."""
        return self if self.distil is not None else replace(self, distil=int(self.scope == "layer" and bool(texts)))

    @property
    def compares_layers(self) -> bool:
        """Whether costs of different layers are compared by their gradients."""
        power = find_criterion(self.criterion).power
        return self.scope == "model" and self.weighted and power > 0


@dataclass(frozen=True, eq=False)
class Compressed:
    """A model with fewer stored experts, and what was done to it.

    Attributes:
        model: the smaller one, in evaluation mode.
        report: who went, and what is left.
    """

    model: PreTrainedModel
    report: Report

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Writes model and report to a new folder, atomically; what experts share is written once.

        Where routers were cut and every layer keeps as many experts, it is an ordinary checkpoint that any program for
        the family opens. Otherwise only ``Compressed.load`` opens it: ``from_pretrained``, which knows no shared
        experts and one number of experts for all layers, finds no weights there.

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
    capture: Capture,
    budget: float,
    *,
    criterion: str = DEFAULT,
    scope: Scope = "model",
    texts: Sequence[Batch] | None = None,
    weighted: bool = True,
    refit: bool = True,
    distil: int | None = None,
    seed: int = 0,
) -> Compressed:
    """A copy of the model that keeps ``budget`` of its experts.

    Args:
        model: left as it is.
        capture: of this model; what its experts are given says which of them can go.
        budget: share of the experts to keep at most, 0 < budget <= 1; 1 changes nothing.
        criterion: which experts of a layer go first, and what becomes of them; see ``CRITERIA``.
        scope: whether each layer keeps that share, as published methods do, or the model: always the expert goes next
            that costs least, and layers keep different numbers.
        texts: batches of the text, for what a capture does not hold: the gradient at each layer's output (one pass of
            them), and what the whole model predicts.
        weighted: whether costs are multiplied by the layer's gradient before layers are compared: squared errors by its
            mean squared norm, norms by its root. Of no effect where every layer keeps the same share.
        refit: whether the down-projections that are left are fitted anew, see ``refit``.
        distil: passes over the texts in which the routers learn what the whole model predicts, see ``distil_routers``;
            None is one pass where every layer keeps the same share and there are texts.
        seed: of random criteria.

    Raises:
        LamellaError: a budget that cannot be reached, an unknown criterion, texts missing, a capture of another model,
            or a model without experts of its own.
    """
    settings = Settings(criterion, scope, weighted, refit, distil, seed)
    (compressed,) = compress_each(model, capture, [budget], settings, texts)
    return compressed


def compress_each(
    model: PreTrainedModel,
    capture: Capture,
    budgets: Sequence[float],
    settings: Settings,
    texts: Sequence[Batch] | None = None,
    rankings: Mapping[int, Ranking] | None = None,
    gradients: Mapping[int, float] | None = None,
) -> Iterator[Compressed]:
    """``compress`` to each budget, one after the other; what is the same for all is computed once.

    ``rankings`` are what ``rank_experts`` gave for the criterion and the seed, ``gradients`` what ``layer_gradients``
    did for the texts, where they are at hand.
    """
    check_arguments(budgets, settings, texts)
    settings = settings.with_passes(texts)
    model = uncompiled(model)
    layers, criterion = _whole_layers(model), find_criterion(settings.criterion)
    capture.check(model)
    ranked = rank_experts(model, capture, settings.criterion, settings.seed) if rankings is None else rankings
    if not settings.compares_layers:
        gradients = None
    elif gradients is None:
        gradients = layer_gradients(model, layers, texts or ())
    # all of them first: a budget out of reach is refused before the first model
    plans = [experts_to_go(layers, ranked, criterion, budget, settings.scope, gradients) for budget in budgets]
    for budget, gone in zip(budgets, plans, strict=True):
        small = _smaller(model, layers, criterion, ranked, gone)
        changed = {index for index, count in gone.items() if count}
        if settings.refit:
            with evaluating(model):
                for layer, left in zip(layers, moe_layers(small), strict=True):
                    if layer.index in changed:
                        refit_layer(LayerSample.of(layer, capture), left)
        if settings.distil and changed:
            assert texts is not None
            distil_routers(small, model, texts, settings.distil)
        report = _report(model, small, layers, criterion, ranked, gone, budget, settings)
        if changed:  # by which an adapter trained on it knows its base again
            name = f"{report.experts_left} of {report.experts} experts, {model_fingerprint(small)}"
            small.config.lamella_compressed = name
        yield Compressed(small, report)


def rank_experts(model: PreTrainedModel, capture: Capture, criterion: str, seed: int = 0) -> dict[int, Ranking]:
    """What a criterion says of every layer, by index."""
    rank = find_criterion(criterion).rank
    with evaluating(model):
        return {layer.index: rank(LayerSample.of(layer, capture), seed) for layer in _whole_layers(model)}


def check_arguments(budgets: Sequence[float], settings: Settings, texts: Sequence[Batch] | None) -> None:
    """What can be refused before anything is computed.

    Raises:
        LamellaError: a budget outside 0 to 1, an unknown criterion or scope, or texts that are needed and missing.
    """
    for budget in budgets:
        check_budget(budget, settings.scope)
    if (settings.compares_layers or settings.distil) and not texts:
        raise LamellaError(
            f"criterion={settings.criterion!r} with scope={settings.scope!r}, weighted={settings.weighted} and "
            f"distil={settings.distil} reads text beside the capture; give texts=, the batches that were captured."
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


@torch.no_grad()
def _smaller(
    model: PreTrainedModel,
    layers: Sequence[MoELayer],
    criterion: Criterion,
    rankings: Mapping[int, Ranking],
    gone: Mapping[int, int],
) -> PreTrainedModel:
    """A copy of the model without the experts that are gone."""
    changed = [layer for layer in layers if gone[layer.index]]
    groups = {layer.index: _groups(layer, rankings[layer.index], gone[layer.index]) for layer in changed}
    if not criterion.cuts_router:
        pools = {
            id(layer.experts_module): _pool(layer, criterion, rankings[layer.index], groups[layer.index])
            for layer in changed
        }
        return copy.deepcopy(model, pools).eval()  # the memo's pools stand in the places of the experts
    kept = {index: sorted(group[0] for group in of_layer) for index, of_layer in groups.items()}
    small = without_experts(model, kept)
    for layer, left in zip(layers, moe_layers(small), strict=True):
        for group in groups.get(layer.index, ()) if criterion.action == "merge" else ():
            if len(group) > 1:
                place = kept[layer.index].index(group[0])
                left.experts[place].write(_average(layer, rankings[layer.index], group))
    return small.eval()


def _groups(layer: MoELayer, ranking: Ranking, gone: int) -> list[list[int]]:
    """Who comes together, each group with the one first that is kept; those that have no successor are in none."""
    if ranking.groups is not None:
        return ranking.groups(gone)
    dropped = set(ranking.order[:gone])
    return [[expert] for expert in range(layer.num_experts) if expert not in dropped]


def _pool(layer: MoELayer, criterion: Criterion, ranking: Ranking, groups: Sequence[Sequence[int]]) -> PooledExperts:
    """The experts that are stored, in a place for each that the router chooses from."""
    at: dict[int, int] = {}
    stored: list[nn.Module] = []
    for group in groups:
        merged = criterion.action == "merge" and len(group) > 1
        expert = _average(layer, ranking, group) if merged else layer.experts[group[0]]
        first = StoredExpert.copy_of(expert)
        at |= dict.fromkeys(group, len(stored))
        stored.append(first)
        for member in group[1:]:
            if ranking.aligners is not None and (member, group[0]) in ranking.aligners:
                at[member] = len(stored)
                stored.append(first.behind(*ranking.aligners[member, group[0]]))
    for expert_index in range(layer.num_experts):
        if expert_index not in at:
            assert ranking.constants is not None
            at[expert_index] = len(stored)
            stored.append(constant_expert(layer.experts[expert_index], ranking.constants[expert_index]))
    places = torch.tensor([at[expert] for expert in range(layer.num_experts)], device=layer.experts[0].down.device)
    return PooledExperts(stored, places, layer.family.chosen)


def _average(layer: MoELayer, ranking: Ranking, group: Sequence[int]) -> Any:
    weights = [1.0] * len(group) if ranking.weights is None else ranking.weights[list(group)].tolist()
    return average([layer.experts[expert] for expert in group], weights, matched=ranking.matched)


def _report(
    model: PreTrainedModel,
    small: PreTrainedModel,
    layers: Sequence[MoELayer],
    criterion: Criterion,
    rankings: Mapping[int, Ranking],
    gone: Mapping[int, int],
    budget: float,
    settings: Settings,
) -> Report:
    groups: list[tuple[Name, ...]] = []
    dropped: list[Name] = []
    for layer in layers:
        of_layer = _groups(layer, rankings[layer.index], gone[layer.index])
        groups += [tuple((layer.index, expert) for expert in group) for group in of_layer]
        present = {expert for group in of_layer for expert in group}
        dropped += [(layer.index, expert) for expert in range(layer.num_experts) if expert not in present]
    return Report(
        budget=budget,
        action=criterion.action,
        experts=sum(layer.num_experts for layer in layers),
        experts_left=len(groups),
        expert_parameters_before=expert_parameters(layers),
        expert_parameters=expert_parameters(moe_layers(small)),
        parameters_before=_count(model),
        parameters=_count(small),
        groups=tuple(groups),
        dropped=tuple(dropped),
        cut=criterion.cuts_router,
        **asdict(settings),
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Report:
    """Who went, and what is left.

    Attributes:
        criterion, scope, weighted, refit, distil, seed, budget: as ``compress`` was called; distil as it was done.
        action: whether experts were dropped, replaced or merged.
        experts: how many the model had.
        experts_left: how many are left, or groups of which each is stored once.
        expert_parameters_before, expert_parameters: numbers that the experts store.
        parameters_before, parameters: numbers that the whole model stores.
        groups: the experts of each group as (layer, expert), first the one that stands for all.
        dropped: those that nothing stands for, or a constant.
        cut: whether the routers of layers that lost experts have fewer rows.
    """

    criterion: str
    scope: str
    weighted: bool
    refit: bool
    distil: int
    seed: int
    budget: float
    action: str
    experts: int
    experts_left: int
    expert_parameters_before: int
    expert_parameters: int
    parameters_before: int
    parameters: int
    groups: tuple[tuple[Name, ...], ...]
    dropped: tuple[Name, ...]
    cut: bool

    @property
    def kept(self) -> dict[int, list[int]]:
        """The experts of each layer that the router still has rows for, where routers were cut."""
        kept: dict[int, list[int]] = {}
        for (layer, expert), *_ in self.groups if self.cut else ():
            kept.setdefault(layer, []).append(expert)
        return {layer: sorted(experts) for layer, experts in kept.items()}

    @property
    def gone(self) -> list[Name]:
        """The experts that are not stored any more."""
        return sorted([*self.dropped, *(name for group in self.groups for name in group[1:])])

    @property
    def frame(self) -> pd.DataFrame:
        """One row per expert: layer, expert, group, and the layer and expert that stand for it; -1 where none does."""
        pd = optional_module("pandas", "A table of groups")

        rows = [(*key, at, *group[0]) for at, group in enumerate(self.groups) for key in group]
        rows += [(*key, -1, -1, -1) for key in self.dropped]
        columns = ["layer", "expert", "group", "by_layer", "by_expert"]
        return pd.DataFrame(rows, columns=columns).sort_values(["layer", "expert"], ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, written: dict[str, Any]) -> Report:
        """From what ``to_dict`` gave, also after JSON made lists of its tuples; the first edition's too."""
        if "method" in written:
            action = "merge" if written["merged"] else "replace"
            former = {"criterion": written["method"], "scope": "model", "weighted": False, "refit": False, "distil": 0}
            written = {**former, "action": action, "dropped": [], "cut": False, **written}
        groups = tuple(tuple((int(layer), int(expert)) for layer, expert in group) for group in written["groups"])
        dropped = tuple((int(layer), int(expert)) for layer, expert in written["dropped"])
        known = {field.name: written[field.name] for field in fields(cls)}
        return cls(**{**known, "groups": groups, "dropped": dropped})

    def __str__(self) -> str:
        done = {"drop": "dropped", "replace": "replaced", "merge": "merged into others"}[self.action]
        return (
            f"{self.experts - self.experts_left} of {self.experts} experts {done} by {self.criterion}: "
            f"{self.expert_parameters:,} of {self.expert_parameters_before:,} expert parameters stored, "
            f"{self.parameters:,} of {self.parameters_before:,} in the whole model"
        )
