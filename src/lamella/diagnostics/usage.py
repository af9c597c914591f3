"""How routers use their experts on real data: collapse, entropy, experts that never fire."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lamella.diagnostics.parts import device_of, to_device
from lamella.diagnostics.undisturbed import undisturbed
from lamella.findings import Examination
from lamella.lab.runs.callbacks import DEAD_SHARE
from lamella.tracing import record_routing
from lamella.tuners.routed import RoutedLayer, routed_layers

if TYPE_CHECKING:
    import pandas as pd

# part of the real tokens that use the router's favourite expert
COLLAPSED = 0.99
# part of the largest entropy there can be, ln N
NEAR_ZERO = 0.05
# an expert is missed only where it would have fired this often under even use
_EXPECTED = 20


@dataclass(frozen=True)
class _Use:
    """One router over the tokens, or the sequences, of a trace: `favourite` is the part of them that use its most used
    expert; `of_blocks`: whether the experts are whole blocks, which are there anyway and need not all be used.
    """

    name: str
    tokens: int
    num_experts: int
    top_k: int
    weights: tuple[float, ...]
    favourite: float
    entropy: float
    silent: tuple[int, ...]
    of_blocks: bool

    @property
    def enough(self) -> bool:
        return self.tokens * self.top_k >= _EXPECTED * self.num_experts


def examine_usage(model: nn.Module, batches: Iterable[Mapping[str, Any]], examination: Examination) -> None:
    """Routes real batches in evaluation mode and judges what is seen; the model is left as it was."""
    layers = routed_layers(model)
    if not layers:
        return
    with undisturbed(model), torch.no_grad(), record_routing(model) as trace:
        model.eval()
        for batch in batches:
            model(**to_device(batch, device_of(model)))
    judge_usage(trace.frame, model, "the given batches", examination)


def judge_usage(frame: pd.DataFrame, model: nn.Module, source: str, examination: Examination) -> None:
    """Judges the frame of a trace of this model.

    Args:
        frame: of a trace.
        model: tells each router's top-k and whether its experts have been trained.
        source: what was traced, in words.
        examination: takes the findings.
    """
    layers = {_key(layer): layer for layer in routed_layers(model)}
    if layers and all(layer.untrained for layer in layers.values()):
        examination.saw(f"routing on {source}: not judged, the experts have not been trained (B is zero everywhere)")
        return
    uses = []
    for key, rows in frame.groupby(["adapter", "stack", "layer", "module"], sort=False):
        if key in layers:
            uses.append(_use(layers[key], rows))
    judged = [use for use in uses if use.enough]
    tokens = max((use.tokens for use in uses), default=0)
    few = f"; {len(uses) - len(judged)} saw too few tokens to judge" if len(judged) < len(uses) else ""
    examination.saw(f"routing on {source}: {len(judged)} of {len(layers)} routers judged, {tokens:,} real tokens{few}")
    _report(judged, examination)
    _report_unused(judged, layers.values(), examination)


def _key(layer: RoutedLayer) -> tuple[str, str, int, str]:
    """As in a trace's frame."""
    return layer.adapter, layer.place.stack, layer.place.layer, layer.place.module


def _use(layer: RoutedLayer, rows: pd.DataFrame) -> _Use:
    shares: Sequence[float] = rows["share"].tolist()  # of selections; k of them per token
    return _Use(
        name=layer.name,
        tokens=int(rows["tokens"].iloc[0]),
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        weights=tuple(rows["mean_weight"]),
        favourite=max(shares) * layer.top_k,
        entropy=float(rows["entropy"].iloc[0]),
        silent=tuple(expert for expert, share in zip(rows["expert"], shares, strict=True) if share == 0),
        of_blocks=layer.chooses_blocks,
    )


def _report(uses: Sequence[_Use], examination: Examination) -> None:
    balance = "raise router_aux_loss_coef, lower router_lr, or give these layers fewer experts"
    collapsed = _those(uses, lambda use: use.top_k < use.num_experts and use.favourite >= COLLAPSED)
    if found := [use for use in collapsed if not use.of_blocks]:
        examination.warning(
            "router-collapsed",
            f"{len(found)} router(s) have collapsed: at least {min(use.favourite for use in found):.1%} of the tokens "
            "use the same expert",
            [f"{use.name} ({use.favourite:.1%})" for use in found],
            "whatever the token is, the same expert answers: the router decides nothing, and the others cost for "
            "nothing",
            balance,
        )
    if found := _those(uses, lambda use: use.entropy < NEAR_ZERO * math.log(use.num_experts)):
        examination.warning(
            "entropy-near-zero",
            f"{len(found)} router(s) are certain of every choice: entropy below {NEAR_ZERO:.0%} of ln N",
            [f"{use.name} ({use.entropy:.3f} of {math.log(use.num_experts):.3f} nats)" for use in found],
            "a saturated softmax passes no gradient on, so such a router can no longer change its mind",
            "lower router_lr; set router_z_loss_coef above 0 (MoLA; 1e-3 is usual), use router='cosine' (MoLA, MoLEx), "
            "or raise router_aux_loss_coef or temperature (MOLE)",
        )
    if found := [use for use in collapsed if use.of_blocks]:
        examination.warning(
            "one-guest-for-all",
            f"at {len(found)} block(s) at least {min(use.favourite for use in found):.1%} of inputs get the same guest",
            [f"{use.name} ({use.favourite:.1%})" for use in found],
            "the router decides nothing there: policy='fixed' with that block does the same without a router",
            "raise router_aux_loss_coef, lower router_lr, or compare with policy='fixed' and policy='random'",
        )
    if found := _those(uses, lambda use: bool(use.silent) and not use.of_blocks):
        count = sum(len(use.silent) for use in found)
        examination.warning(
            "expert-never-fires",
            f"{count} expert(s) never fire",
            [f"{use.name} (expert {', '.join(map(str, use.silent))})" for use in found],
            "they take memory and training time and do nothing; their last gradient may lie far back",
            balance,
        )


def _report_unused(uses: Sequence[_Use], layers: Iterable[RoutedLayer], examination: Examination) -> None:
    """Trained LoRAs that a composition weighs next to nothing wherever it has them."""
    for names in {layer.expert_names for layer in layers if layer.expert_names}:
        own = [use for use in uses if use.num_experts == len(names)]
        share = [sum(use.weights[lora] for use in own) / max(len(own), 1) * len(names) for lora in range(len(names))]
        if own and (unused := [(name, part) for name, part in zip(names, share, strict=True) if part < DEAD_SHARE]):
            examination.warning(
                "lora-never-counts",
                f"{len(unused)} of {len(names)} LoRAs get less than {DEAD_SHARE:.0%} of an even share of the weight",
                [f"{name} ({part:.1%})" for name, part in unused],
                "the composition answers without them: they take memory and time for nothing, or the routers have "
                "collapsed onto the others",
                "leave them out of the composition, or raise router_aux_loss_coef",
            )


def _those(uses: Sequence[_Use], holds: Callable[[_Use], bool]) -> list[_Use]:
    return [use for use in uses if holds(use)]
