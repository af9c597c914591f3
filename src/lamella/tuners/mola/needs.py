"""How much each block needs experts, from a model's weights, from what it makes of texts, or from a trained mixture.

Each measure gives numbers by stack and block, the larger the more experts; `lamella.allocate` shares a budget out by
them. What they are worth is a question to a study: the sources' claims are their own.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.backbones import find_place, locate_stacks, mean_states
from lamella.backbones.offloading import onloaded
from lamella.errors import LamellaError
from lamella.progress import counted
from lamella.tuners.mola.layer import MolaLinear
from lamella.tuners.redundancy import distances, lora_experts

Needs = dict[str, list[float]]  # by the stack's name, one number for each of its blocks

# AlphaLoRA's power of the exponents, beta: how far the allocation departs from an even one.
_ALPHA_POWER = 2.5


@torch.no_grad()
def heavy_tails(model: nn.Module) -> Needs:
    """How light the tails of a block's weights are: the less well a block is trained, the more experts it gets.

    Of each linear weight, ``1 + k / sum_i ln(l_i / l_(k+1))`` over the k largest of its eigenvalues ``l`` of
    ``W W^T``, k being half of them (Hill's estimator); the mean over a block's weights, to the power 2.5.
    Source: AlphaLoRA (arXiv 2410.10054), whose code fits where the tail begins; here it is the upper half.

    Args:
        model: the base.

    Raises:
        LamellaError: a block has no linear weight of plain numbers.
    """
    stacks = locate_stacks(model)
    exponents: dict[tuple[str, int], list[float]] = {}
    for name, module in counted(list(_of_base(model)), "the tails of weights", "modules"):
        place = find_place(name, stacks)
        if place is None or not isinstance(module, nn.Linear | Conv1D):
            continue
        with onloaded(module):
            if _has_numbers(module.weight):
                exponents.setdefault((place.stack, place.layer), []).append(_hill(module.weight))
    for stack in stacks:
        for layer in range(stack.depth):
            if (stack.name, layer) not in exponents:
                raise LamellaError(
                    f"Block {layer} of {stack.name} has no linear weight of plain numbers, as it is quantised or not "
                    "there. Give num_experts as a list or a shape."
                )
    means = {block: sum(values) / len(values) for block, values in exponents.items()}
    return {stack.name: [means[stack.name, at] ** _ALPHA_POWER for at in range(stack.depth)] for stack in stacks}


def _of_base(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model's modules by name, without what adapters that are on it already have added."""
    modules = dict(model.named_modules())
    added = tuple(
        f"{name}.{held}."
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for held in module.adapter_layer_names
    )
    return ((name, module) for name, module in modules.items() if not name.startswith(added))


def _has_numbers(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta and min(weight.shape) > 1


def _hill(weight: Tensor) -> float:
    matrix = weight.float() if weight.shape[0] <= weight.shape[1] else weight.float().t()
    values = torch.linalg.eigvalsh(matrix @ matrix.t()).clamp_min(torch.finfo(torch.float32).tiny)  # ascending
    tail = values[len(values) - len(values) // 2 :].log()
    above = float((tail - values[len(values) - len(values) // 2 - 1].log()).mean())
    return 1 + 1 / max(above, torch.finfo(torch.float32).eps)


@torch.no_grad()
def diversity(model: nn.Module, tasks: Sequence[Iterable[Mapping[str, Any]]]) -> Needs:
    """How unlike a frozen model's blocks represent several tasks: where they differ, experts can specialise.

    One minus the mean cosine between the tasks' representations behind a block, a task's being the mean over its
    documents of the mean over their real tokens. Of one task alone its documents are compared with each other.

    Args:
        model: without adapters, in evaluation mode.
        tasks: batches for the model, of each task.

    Raises:
        LamellaError: fewer than two representations, or a model with more stacks than one.
    """
    stacks = locate_stacks(model)
    if len(stacks) > 1:
        raise LamellaError(
            f"{type(model).__name__} has {len(stacks)} stacks of blocks, which read different tokens. Diversity of "
            "representations is measured in models with one; take another criterion."
        )
    (stack,) = stacks
    # each (blocks, documents, width)
    seen, *others = [mean_states(model, stack.name, batches)[1:] for batches in tasks]
    if others:
        seen = torch.stack([documents.mean(dim=1) for documents in (seen, *others)], dim=1)  # (blocks, tasks, width)
    if seen.shape[1] < 2:
        raise LamellaError("Diversity compares tasks, or the documents of one. Give several, or more documents.")
    unit = nn.functional.normalize(seen, dim=-1)
    cosines = unit @ unit.transpose(1, 2)  # (blocks, n, n)
    n = seen.shape[1]
    mean = (cosines.sum(dim=(1, 2)) - n) / (n * (n - 1))
    return {stack.name: (1 - mean).clamp_min(0).tolist()}


def distinctness(model: nn.Module) -> Needs:
    """How unlike a trained block's experts are: `lamella.redundancy`, normalised, in the mean over its modules.

    Where experts are alike, fewer would do (MoLA §6). A block with one expert shows nothing of that, and has the mean
    of the others.

    Raises:
        LamellaError: no block has trained experts to compare.
    """
    of_modules: dict[tuple[str, int], list[float]] = {}
    for layer in lora_experts(model):
        normalised = distances(layer)[1]
        if not math.isnan(normalised):  # all are zero still
            of_modules.setdefault((layer.place.stack, layer.place.layer), []).append(normalised)
    if not of_modules:
        raise LamellaError(f"{type(model).__name__} has no trained LoRA experts to compare with each other.")
    return _filled(model, {block: sum(values) / len(values) for block, values in of_modules.items()})


@torch.no_grad()
def contribution(model: nn.Module, loss: Callable[[], float]) -> Needs:
    """By how much the loss grows without what each expert of a block has learned, added up; never below zero.

    Expert e of a block is expert e of all its modules; without it, they add nothing where a router chooses it. A block
    without experts has the mean of the others.

    Args:
        model: with one active MoLA adapter, in evaluation mode, restored afterwards.
        loss: of the model on fixed rows that it was not trained on.

    Raises:
        LamellaError: no MoLA adapter.
    """
    blocks: dict[tuple[str, int], list[MolaLinear]] = {}
    for module in model.modules():
        if isinstance(module, MolaLinear) and module.place.stack and module.active_adapters[0] in module.experts:
            blocks.setdefault((module.place.stack, module.place.layer), []).append(module)
    if not blocks:
        raise LamellaError(f"{type(model).__name__} has no MoLA adapter on its blocks, so no experts to do without.")
    counts = {block: max(_count(layer) for layer in layers) for block, layers in blocks.items()}
    whole = loss()
    grown = dict.fromkeys(blocks, 0.0)
    pieces = [(block, expert) for block, count in counts.items() for expert in range(count)]
    for block, expert in counted(pieces, "the loss without each expert", "experts"):
        with _without(blocks[block], expert):
            grown[block] += max(0.0, loss() - whole)
    return _filled(model, grown)


def _count(layer: MolaLinear) -> int:
    return layer.experts[layer.active_adapters[0]].num_experts


@contextmanager
def _without(layers: Sequence[MolaLinear], expert: int) -> Iterator[None]:
    """What one expert of these modules has learned is taken away inside: B is zero, or both are as they started."""
    kept: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        if expert >= _count(layer):
            continue
        adapter = layer.active_adapters[0]
        A, B = layer.factors(adapter)
        started = dict(zip((A, B), layer.starts(adapter), strict=False)) or {B: torch.zeros_like(B)}
        for factor, start in started.items():
            kept.append((factor[expert], factor[expert].clone()))
            factor[expert] = start[expert]
    try:
        yield
    finally:
        for place, value in kept:
            place.copy_(value)


def _filled(model: nn.Module, values: Mapping[tuple[str, int], float]) -> Needs:
    """By stack and block; a block that shows nothing has the mean of the others."""
    typical = sum(values.values()) / len(values)
    stacks = locate_stacks(model.get_base_model() if isinstance(model, PeftModel) else model)
    return {stack.name: [values.get((stack.name, at), typical) for at in range(stack.depth)] for stack in stacks}


def of_one_depth(needs: Needs) -> list[float]:
    """One number per block, where stacks of one depth share an allocation: their mean.

    Raises:
        LamellaError: the stacks differ in depth.
    """
    depths = {len(values) for values in needs.values()}
    if len(depths) != 1:
        counts = ", ".join(str(len(values)) for values in needs.values())
        raise LamellaError(
            f"The stacks {', '.join(needs)} have {counts} blocks, and one allocation does not fit them all. Give "
            "num_experts as a shape."
        )
    if len(needs) == 1:
        return next(iter(needs.values()))
    normalised = [[value / (sum(values) or 1) for value in values] for values in needs.values()]
    return [sum(of_block) / len(normalised) for of_block in zip(*normalised, strict=True)]
