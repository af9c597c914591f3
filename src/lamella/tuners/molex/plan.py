"""Which blocks mix, among which candidates, and where a router decides: settled before the model is touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lamella.backbones import Stack, kinds_of_blocks, why_no_sequences, width_of
from lamella.errors import LamellaError
from lamella.tuners.molex.config import MolexConfig
from lamella.tuners.targets import check_names, chosen_blocks


@dataclass(frozen=True)
class Depth:
    """What happens at one block.

    Attributes:
        index: the block's index in its stack.
        candidates: indices of the blocks that can be its guest, itself among them where that is one; those of a second
            model go on from the stack's own.
        top_k: guests per decision.
        mixes: whether it has a guest at all.
        routes: whether a router decides; with a single candidate there is nothing to decide.
    """

    index: int
    candidates: tuple[int, ...]
    top_k: int
    mixes: bool
    routes: bool


@dataclass(frozen=True)
class StackPlan:
    """What happens in one stack: ``depths`` holds the blocks that MoLEx wraps."""

    stack: Stack
    depths: tuple[Depth, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def make_plans(model: nn.Module, config: MolexConfig, stacks: Sequence[Stack], others: int = 0) -> list[StackPlan]:
    """Settles what happens in each stack.

    Args:
        model: the model, with its bare blocks in place.
        config: the settings.
        stacks: its stacks.
        others: blocks of a second model that can be guests too.

    Raises:
        LamellaError: settings that do not fit this model, or that leave a router nothing to decide.
    """
    if config.policy == "fixed" and config.fixed_layer is None:
        raise LamellaError(
            "policy='fixed' needs fixed_layer, the index of the block that is every block's guest. "
            "lamella.tuners.molex.best_fixed_layer(model, batches, config) finds the best on training data."
        )
    check_names(model, config, [f"{stack.name}.{index}" for stack in stacks for index in range(stack.depth)])
    wrapped = chosen_blocks(model, config, stacks)
    obstacles = {stack.name: reason for stack, _ in wrapped if config.mixes and (reason := _why_not(model, stack))}
    if len(obstacles) == len(wrapped) or (obstacles and config.layers_pattern):
        raise LamellaError(next(iter(obstacles.values())))
    plans = [
        StackPlan(stack, (), ((stack.name, obstacles[stack.name]),), ())
        if stack.name in obstacles
        else _plan(model, config, stack, layers, others)
        for stack, layers in wrapped
    ]
    _refuse_idle(config, [depth for plan in plans for depth in plan.depths])
    return plans


def _why_not(model: nn.Module, stack: Stack) -> str | None:
    """Why no block of a stack can run in another's place; None where nothing is known against it."""
    try:
        width_of(model, stack.name)
    except LamellaError as error:
        return str(error)
    return why_no_sequences(model, stack.name)


def _plan(model: nn.Module, config: MolexConfig, stack: Stack, layers: list[int], others: int) -> StackPlan:
    kinds = kinds_of_blocks(model, stack)
    excluded = {layer for layer in layers if _is_excluded(config, f"{stack.name}.{layer}")}
    depths: list[Depth] = []
    skipped = [(f"{stack.name}.{layer}", "named in exclude_modules") for layer in sorted(excluded)]
    notes: list[str] = []
    for layer in [layer for layer in layers if layer not in excluded]:
        candidates = _candidates(config, stack, kinds, layer, others)
        depth = _depth(config, layer, candidates)
        depths.append(depth)
        if config.mixes and not depth.mixes:
            notes.append(f"block {layer} of {stack.name} runs without a guest: {_why_alone(config)}")
        elif config.mixes and config.policy in ("learned", "random") and depth.top_k < config.top_k:
            notes.append(f"block {layer} of {stack.name} has {len(candidates)} candidates, so it uses {depth.top_k}")
    return StackPlan(stack, tuple(depths), tuple(skipped), tuple(notes))


def _is_excluded(config: MolexConfig, name: str) -> bool:
    asked = SimpleNamespace(exclude_modules=config.exclude_modules, modules_to_save=None, target_modules={name})
    return not check_target_module_exists(asked, name)


def _candidates(config: MolexConfig, stack: Stack, kinds: list[str], layer: int, others: int) -> tuple[int, ...]:
    alike = [other for other, kind in enumerate(kinds) if kind == kinds[layer]]
    alike += range(stack.depth, stack.depth + others)  # behind an aligner, any can run in any place
    if config.policy == "self":
        return (layer,)
    if config.policy == "fixed":
        assert config.fixed_layer is not None
        _refuse_outside([config.fixed_layer], "fixed_layer", config.fixed_layer, stack, others)
        return tuple(other for other in alike if other == config.fixed_layer)
    if config.candidates == "all":
        return tuple(alike)
    if config.candidates == "later":
        return tuple(other for other in alike if other > layer)
    assert isinstance(config.candidates, list)
    _refuse_outside(config.candidates, "candidates", config.candidates, stack, others)
    unlike = [other for other in config.candidates if other not in alike]
    if unlike:
        raise LamellaError(
            f"candidates={config.candidates!r} names block {unlike[0]} of {stack.name} ({kinds[unlike[0]]}), which is "
            f"unlike block {layer} ({kinds[layer]}) and cannot run in its place. Name blocks of one kind and give "
            "those to layers_to_transform, or use candidates='all', which takes for each block those of its kind."
        )
    return tuple(sorted(config.candidates))


def _refuse_outside(indices: list[int], setting: str, value: object, stack: Stack, others: int) -> None:
    outside = [index for index in indices if index >= stack.depth + others]
    if outside:
        more = f" and the second model {others}" if others else ""
        raise LamellaError(
            f"{setting}={value!r} names block {outside[0]}, but {stack.name} has {stack.depth} blocks{more}, counted "
            "from 0."
        )


def _depth(config: MolexConfig, layer: int, candidates: tuple[int, ...]) -> Depth:
    mixes = config.mixes and bool(set(candidates) - {layer})
    # One candidate under a softmax has probability 1 whatever its score, so there is nothing to learn.
    is_choice = len(candidates) > 1 or config.score == "sigmoid"
    chosen = len(candidates) if config.policy == "uniform" else min(config.top_k, len(candidates))
    return Depth(layer, candidates, chosen, mixes, mixes and config.policy == "learned" and is_choice)


def _why_alone(config: MolexConfig) -> str:
    if config.policy == "fixed":
        return f"block {config.fixed_layer} is itself, or of another kind"
    if config.candidates == "later":
        return "no block of its kind is later"
    return "no candidate but itself"


def _refuse_idle(config: MolexConfig, depths: list[Depth]) -> None:
    if not depths:
        raise LamellaError(
            f"exclude_modules={config.exclude_modules!r} leaves no block that MoLEx could wrap; exclude fewer."
        )
    if not config.mixes:
        return
    if config.policy == "learned" and max(depth.top_k for depth in depths) < config.top_k:
        raise LamellaError(
            f"top_k={config.top_k} guests cannot be chosen: no block has more candidates of its kind than "
            f"{max(len(depth.candidates) for depth in depths)}. Lower top_k, or widen candidates."
        )
    if not any(depth.mixes for depth in depths):
        raise LamellaError(
            f"No block has a guest with policy={config.policy!r} and candidates={config.candidates!r}: "
            f"{_why_alone(config)}. Widen candidates, or use policy='self', which is plain LoRA."
        )
    if config.policy == "learned" and not any(depth.routes for depth in depths):
        raise LamellaError(
            f"The router cannot receive a gradient: with candidates={config.candidates!r} every block has one "
            "candidate, whose probability is 1 whatever the router says. Widen candidates, or name the block with "
            "policy='fixed' and fixed_layer."
        )
