"""How routers use their experts on real data: collapse, entropy, experts that never fire."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamella.diagnostics.running import device_of, preserve_state, to_device
from lamella.findings import Examination
from lamella.tracing import RouterUse, record_routing
from lamella.tuners.routed import RoutedLayer, routed_layers

# an expert with less than this part of an even share does next to nothing
DEAD_SHARE = 0.05
# part of the real tokens that use the router's favourite expert
COLLAPSED = 0.99
# part of the largest entropy there can be, ln N
NEAR_ZERO = 0.05
# below it, one of a decision's k experts has nearly all of the weight: 98 % and 2 % of two count by 1.05
NEARLY_ONE = 1.05
# an expert is missed only where it would have fired this often under even use
_EXPECTED = 20
# how many guests are named
_MOST_CHOSEN = 5


@dataclass(frozen=True)
class _Judged:
    """A router of the model with what it did in the trace."""

    layer: RoutedLayer
    use: RouterUse

    @property
    def enough(self) -> bool:
        """Whether it decided often enough to judge it."""
        return self.use.tokens * self.layer.top_k >= _EXPECTED * self.layer.num_experts

    @property
    def favourite(self) -> float:
        """The part of the tokens that use its most used expert."""
        return max(self.use.shares) * self.layer.top_k

    @property
    def favourite_name(self) -> str:
        """What that expert is called."""
        at = max(range(len(self.use.shares)), key=lambda expert: self.use.shares[expert])
        return self.layer.expert_names[at] if self.layer.expert_names else str(at)

    @property
    def silent(self) -> list[int]:
        """Experts that were never chosen."""
        return [expert for expert, share in enumerate(self.use.shares) if share == 0]


def examine_usage(model: nn.Module, batches: Iterable[Mapping[str, Any]], examination: Examination) -> None:
    """Routes real batches in evaluation mode and judges what is seen; the model is left as it was."""
    if not routed_layers(model):
        return
    with preserve_state(model), torch.no_grad(), record_routing(model) as trace:
        model.eval()
        for batch in batches:
            model(**to_device(batch, device_of(model)))
    judge_usage(trace.routers, model, "the given batches", examination)


def judge_usage(uses: Iterable[RouterUse], model: nn.Module, source: str, examination: Examination) -> None:
    """Judges what a trace of this model says.

    Args:
        uses: of a trace.
        model: tells each router's top-k and whether its experts have been trained.
        source: what was traced, in words.
        examination: takes the findings.
    """
    layers = {
        (layer.adapter, layer.place.stack, layer.place.layer, layer.place.module): layer
        for layer in routed_layers(model)
    }
    if layers and all(layer.untrained for layer in layers.values()):
        examination.saw(f"routing on {source}: not judged, the experts have not been trained (B is zero everywhere)")
        return
    by_key = {(use.adapter, use.stack, use.layer, use.module): use for use in uses}
    seen = [_Judged(layers[key], use) for key, use in by_key.items() if key in layers]
    judged = [one for one in seen if one.enough]
    tokens = max((one.use.tokens for one in seen), default=0)
    few = f"; {len(seen) - len(judged)} saw too few tokens to judge" if len(judged) < len(seen) else ""
    examination.saw(f"routing on {source}: {len(judged)} of {len(layers)} routers judged, {tokens:,} real tokens{few}")
    _say_guests([one for one in judged if one.layer.chooses_blocks], examination)
    _report(judged, examination)
    _report_unused(judged, examination)


def _report(routers: Sequence[_Judged], examination: Examination) -> None:
    balance = "raise router_aux_loss_coef, lower router_lr, or give these layers fewer experts"
    lora_experts = [one for one in routers if not one.layer.chooses_blocks]
    blocks = [one for one in routers if one.layer.chooses_blocks]
    if collapsed := [one for one in lora_experts if _has_collapsed(one)]:
        examination.warning(
            "router-collapsed",
            f"{len(collapsed)} router(s) have collapsed: at least {min(one.favourite for one in collapsed):.1%} of the "
            "tokens use the same expert",
            [f"{one.layer.name} ({one.favourite:.1%})" for one in collapsed],
            "whatever the token is, the same expert answers: the router decides nothing, and the others cost for "
            "nothing",
            balance,
        )
    most = {one.layer.name: math.log(one.layer.num_experts) for one in routers}  # nats
    if certain := [one for one in routers if one.use.entropy < NEAR_ZERO * most[one.layer.name]]:
        examination.warning(
            "entropy-near-zero",
            f"{len(certain)} router(s) are certain of every choice: entropy below {NEAR_ZERO:.0%} of ln N",
            [f"{one.layer.name} ({one.use.entropy:.3f} of {most[one.layer.name]:.3f} nats)" for one in certain],
            "a saturated softmax passes no gradient on, so such a router can no longer change its mind",
            "lower router_lr; set router_z_loss_coef above 0 (MoLA; 1e-3 is usual), use router='cosine' (MoLA, MoLEx), "
            "or raise router_aux_loss_coef or temperature (MOLE)",
        )
    if lonely := [one for one in lora_experts if one not in certain and _counts_by_one(one)]:
        examination.warning(
            "one-expert-counts",
            f"{len(lonely)} router(s) give one of their chosen experts nearly all the weight: a decision counts by "
            f"fewer than {NEARLY_ONE} experts (1 / sum of squared weights)",
            [f"{one.layer.name} ({one.use.effective_experts:.3f} of {one.layer.top_k})" for one in lonely],
            "the other chosen experts take their time and hardly count",
            "top_k=1 does nearly the same for less; or make them count: mixing_weights='equal' (MoLA), a smaller "
            "router_lr",
        )
    if collapsed := [one for one in blocks if _has_collapsed(one)]:
        examination.warning(
            "one-guest-for-all",
            f"at {len(collapsed)} block(s) at least {min(one.favourite for one in collapsed):.1%} of inputs get the "
            "same guest",
            [f"{one.layer.name} ({one.favourite_name}, {one.favourite:.1%})" for one in collapsed],
            "the router decides nothing there: policy='fixed' with that block does the same without a router",
            "raise router_aux_loss_coef, lower router_lr, or compare with policy='fixed' and policy='random'",
        )
    if idle := [one for one in lora_experts if one.silent]:
        examination.warning(
            "expert-never-fires",
            f"{sum(len(one.silent) for one in idle)} expert(s) never fire",
            [f"{one.layer.name} (expert {', '.join(map(str, one.silent))})" for one in idle],
            "they take memory and training time and do nothing; their last gradient may lie far back",
            balance,
        )


def _say_guests(routers: Sequence[_Judged], examination: Examination) -> None:
    """Which blocks are chosen most, where those of a second model are among them."""
    named = [one for one in routers if one.layer.expert_names]
    if not named:
        return
    names = named[0].layer.expert_names
    shares = [sum(of) / len(named) for of in zip(*(one.use.shares for one in named), strict=True)]
    first = sorted(range(len(names)), key=lambda at: -shares[at])[:_MOST_CHOSEN]
    said = ", ".join(f"{names[at]} ({shares[at]:.0%})" for at in first)
    of_second = sum(share for name, share in zip(names, shares, strict=True) if not name.isdigit())
    examination.saw(f"guests: {of_second:.0%} of the choices fall on the second model's blocks; most chosen are {said}")


def _counts_by_one(router: _Judged) -> bool:
    return router.layer.top_k > 1 and router.use.effective_experts < NEARLY_ONE


def _has_collapsed(router: _Judged) -> bool:
    return router.layer.top_k < router.layer.num_experts and router.favourite >= COLLAPSED


def _report_unused(routers: Sequence[_Judged], examination: Examination) -> None:
    """Trained LoRAs whose mixing weights are close to 0 wherever they are."""
    by_names: dict[tuple[str, ...], list[RouterUse]] = {}
    for one in routers:
        if one.layer.expert_names and not one.layer.chooses_blocks:
            by_names.setdefault(one.layer.expert_names, []).append(one.use)
    for names, uses in by_names.items():
        means = [sum(weights) / len(uses) for weights in zip(*(use.mean_weights for use in uses), strict=True)]
        even = sum(means) / len(names) or 1.0  # 1/K, but for gates, which need not sum to 1
        parts = {name: mean / even for name, mean in zip(names, means, strict=True)}
        if unused := {name: part for name, part in parts.items() if part < DEAD_SHARE}:
            examination.warning(
                "lora-never-counts",
                f"{len(unused)} of {len(names)} LoRAs get less than {DEAD_SHARE:.0%} of an even share of the weight",
                [f"{name} ({part:.1%})" for name, part in unused.items()],
                "the composition answers without them: they take memory and time for nothing, or the routers have "
                "collapsed onto the others",
                "leave them out of the composition, or raise router_aux_loss_coef",
            )
