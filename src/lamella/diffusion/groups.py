"""What has a router of its own in a model that makes images, by the names of diffusers' modules."""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from lamella.backbones import Place, Stack, find_place, locate_stacks
from lamella.tuners.mole.plan import GroupPlan, plan_groups, share_balance, sublayer_of

# A transformer block, in a UNet and in a diffusion transformer, is an entry of a list that begins with its attention.
_BLOCK = re.compile(r"(?P<stack>.+)\.(?P<at>\d+)\.(?P<attention>attn1?)\.to_q")
_QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
# In a block whose MLP runs beside its attention it is given the same normed input, and runs first.
_BESIDE_ATTENTION = "proj_mlp"
# What is given the time embedding, before the block's own input is there.
_ADAPTIVE_NORM = "norm"


def plan_groups_of(model: nn.Module, adapted: Sequence[str], granularity: str) -> list[GroupPlan]:
    """Groups the adapted modules of one component into groups that each decide for a whole sample.

    A block's router reads what its self-attention is given. What lies outside the blocks, and what is given the time
    embedding, decides by itself.

    Args:
        model: a denoiser of diffusers, or a text encoder of transformers.
        adapted: names of the modules that any LoRA adapts, in the model's order.
        granularity: "matrix", "sublayer", "block" or "network".
    """
    linear = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    if isinstance(model, PreTrainedModel):
        groups = plan_groups(adapted, linear, locate_stacks(model), granularity, by_token=False)
        for group in groups:
            group.input = "own"  # outside the blocks, too, a row is a sample
        return groups
    stacks, attention = _locate(linear)
    return _plan(adapted, stacks, attention, granularity)


def _locate(linear: Sequence[str]) -> tuple[list[Stack], dict[tuple[str, int], str]]:
    """The lists of transformer blocks, and the name of each block's first attention."""
    attention: dict[tuple[str, int], str] = {}
    for name in linear:
        match = _BLOCK.fullmatch(name)
        if match:
            attention.setdefault((match["stack"], int(match["at"])), match["attention"])
    names = dict.fromkeys(stack for stack, _ in attention)
    depths = {name: sum(stack == name for stack, _ in attention) for name in names}
    return [Stack(name, "encoder", depths[name], "its attention") for name in names], attention


def _plan(
    adapted: Sequence[str], stacks: Sequence[Stack], attention: dict[tuple[str, int], str], granularity: str
) -> list[GroupPlan]:
    groups: dict[Place, GroupPlan] = {}
    for name in adapted:
        place = _place_of_group(name, stacks, granularity)
        group = groups.setdefault(place, GroupPlan(place, "own"))
        group.members.append(name)
        inside = find_place(name, stacks)
        if inside is None or place == inside or not place.stack or _reads(inside, place, stacks[0], attention):
            group.inputs.append(name)
    return share_balance(groups.values())


def _place_of_group(name: str, stacks: Sequence[Stack], granularity: str) -> Place:
    place = find_place(name, stacks)
    if place is None:
        return Place("", 0, name)
    if granularity == "matrix" or place.module.startswith(_ADAPTIVE_NORM):
        return place
    if granularity == "network":
        return Place(stacks[0].name, 0, "network")
    return Place(place.stack, place.layer, "block" if granularity == "block" else sublayer_of(place.module))


def _reads(inside: Place, group: Place, first: Stack, attention: dict[tuple[str, int], str]) -> bool:
    """Whether a module in a block is given its group's own input."""
    attention_name = attention[inside.stack, inside.layer]
    at_entry = [f"{attention_name}.{name}" for name in _QUERY_KEY_VALUE] + [_BESIDE_ATTENTION]
    if group.module == "network":
        return (inside.stack, inside.layer) == (first.name, 0) and inside.module in at_entry
    if group.module in ("block", attention_name):
        return inside.module in at_entry
    # A further attention reads the image in its queries alone, and an MLP in its first matrix.
    return inside.module in (f"{group.module}.to_q", "ff.net.0.proj", _BESIDE_ATTENTION)
