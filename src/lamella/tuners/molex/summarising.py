"""What an injection of MoLEx did, in words and numbers."""

from collections.abc import Callable, Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lamella.backbones import find_place
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.molex.plan import Depth, StackPlan
from lamella.tuners.molex.second_model import SecondModel
from lamella.tuners.summary import Summary


def summarise(
    model: nn.Module,
    adapter: str,
    config: MolexConfig,
    plans: Sequence[StackPlan],
    inside: Sequence[str],
    outside: Sequence[str],
    second: SecondModel | None = None,
) -> Summary:
    """The summary of an adapter that has just been injected.

    Args:
        model: the model it was injected into.
        adapter: its name.
        config: its settings.
        plans: what happens in each stack.
        inside: modules that its LoRA adapts.
        outside: modules that its LoRA matches but leaves alone.
        second: the model whose blocks are guests too; None without one.
    """
    stacks = tuple(plan.stack for plan in plans)
    modules = {stack.name: [0] * stack.depth for stack in stacks}
    for name in inside:
        place = find_place(name, stacks)
        if place is not None:
            modules[place.stack][place.layer] += 1
    skipped = [*(one for plan in plans for one in plan.skipped)]
    skipped += [(name, "outside the blocks, so no guest could run it") for name in outside]
    return Summary(
        method="MoLEx" if config.lora is None else f"MoLEx with LoRA r={config.lora.r}",
        adapter=adapter,
        stacks=stacks,
        experts={plan.stack.name: _by_block(plan, lambda depth: len(depth.candidates)) for plan in plans},
        top_k={plan.stack.name: _by_block(plan, lambda depth: depth.top_k) for plan in plans},
        modules=modules,
        skipped=tuple(skipped),
        notes=(
            *_settings(config),
            *([] if second is None else second.described(stacks[0].depth)),
            *_candidates(config, plans, len(second or ())),
            *(note for plan in plans for note in plan.notes),
        ),
        trainable=_trainable(model, adapter),
        unit=config.granularity,
    )


def _by_block(plan: StackPlan, count: Callable[[Depth], int]) -> list[int]:
    """A number for each block of the stack; 0 where it has no guest."""
    counts = {depth.index: count(depth) for depth in plan.depths if depth.mixes}
    return [counts.get(index, 0) for index in range(plan.stack.depth)]


def _settings(config: MolexConfig) -> Iterator[str]:
    alpha = f"alpha {config.alpha:g} {config.alpha_mode}"
    if config.policy != "learned":
        yield f"policy {config.policy}, {alpha}, no router"
    else:
        yield f"policy learned, {alpha}, {config.router_scope} {config.router} router with {config.score}"
        yield f"{config.aggregate} of a {config.granularity}'s tokens, router gradient by {config.router_gradient}"
    if not config.mixes and config.policy != "self":
        yield "alpha is 1 and fixed, so no guest runs and nothing is decided"
    elif config.policy == "learned" and not config.trains_router:
        yield "the router is frozen as it was drawn: router_gradient='none', router_aux_loss_coef=0"


def _candidates(config: MolexConfig, plans: Sequence[StackPlan], others: int) -> Iterator[str]:
    """Which blocks can be chosen, where it is not simply all of them."""
    if config.policy == "self":
        return
    for plan in plans:
        everything = tuple(range(plan.stack.depth + others))
        alike: dict[tuple[int, ...], list[int]] = {}
        for depth in plan.depths:
            if depth.mixes and depth.candidates != everything:
                alike.setdefault(depth.candidates, []).append(depth.index)
        for candidates, blocks in alike.items():
            yield f"{plan.stack.name}: blocks {_listed(blocks)} choose among {_listed(candidates)}"


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))


def _trainable(model: nn.Module, adapter: str) -> int:
    """Parameters of the adapter that train, without modules_to_save."""
    return sum(
        parameter.numel()
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.adapter_layer_names
        if adapter in getattr(layer, name)
        for parameter in _parameters(getattr(layer, name)[adapter])
        if parameter.requires_grad or adapter not in layer.active_adapters
    )


def _parameters(held: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [held] if isinstance(held, nn.Parameter) else list(held.parameters())
