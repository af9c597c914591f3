"""What has a router of its own in a model that makes images, by the structure of diffusers' models."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lamella.backbones import Place, Stack, find_place, locate_stacks
from lamella.tuners.mole.plan import GroupPlan, plan_groups, share_balance

_QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
# In a block whose MLP runs beside its attention it is given the same normed input, and runs first.
_BESIDE_ATTENTION = "proj_mlp"


@dataclass(frozen=True)
class _Block:
    """A transformer block, by the names inside it.

    Attributes:
        attentions: in its order; the first is what its tokens do among themselves.
        linear: its linear maps, in its order.
        adaptive: those of its norms, which are given the time embedding before the block's own input is there.
    """

    attentions: tuple[str, ...]
    linear: tuple[str, ...]
    adaptive: frozenset[str]

    def sublayer_of(self, module: str) -> str:
        """The attention that a linear map belongs to, or the "mlp"."""
        return next((name for name in self.attentions if module.startswith(f"{name}.")), "mlp")

    def read_in(self, sublayer: str) -> list[str]:
        """The linear maps that are given what a sub-layer is given, or the block where it is "block"."""
        first = self.attentions[0] if sublayer == "block" else sublayer
        inside = [name for name in self.linear if self.sublayer_of(name) == first and name not in self.adaptive]
        if first != self.attentions[0]:  # a further attention reads the image in its queries alone
            return inside[:1]
        same = [name for name in inside if name.removeprefix(f"{first}.") in _QUERY_KEY_VALUE] or inside[:1]
        return [*same, _BESIDE_ATTENTION]


def plan_groups_of(
    model: nn.Module, adapted: Sequence[str], granularity: str, alone: Container[str] = ()
) -> list[GroupPlan]:
    """Groups the adapted modules of one component into groups that each decide for a whole sample.

    A block's router reads what its self-attention is given. What lies outside the blocks, and what is given the time
    embedding, decides by itself.

    Args:
        model: a denoiser of diffusers, or a text encoder of transformers.
        adapted: names of the modules that any LoRA adapts, in the model's order.
        granularity: "matrix", "sublayer", "block" or "network".
        alone: modules that decide by themselves wherever they lie.
    """
    if isinstance(model, PreTrainedModel):
        linear = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
        groups = plan_groups(adapted, linear, locate_stacks(model), granularity, by_token=False, alone=alone)
        for group in groups:
            group.input = "own"  # outside the blocks, too, a row is a sample
        return groups
    blocks = dict(_blocks(model))
    stacks = [
        Stack(name, "encoder", max(at for stack, at in blocks if stack == name) + 1, "its attention")
        for name in dict.fromkeys(stack for stack, _ in blocks)
    ]
    by_place: dict[Place, GroupPlan] = {}
    for name in adapted:
        inside = None if name in alone else _inside(name, stacks, blocks)
        place = Place("", 0, name) if inside is None else _place_of_group(inside, stacks, blocks, granularity)
        group = by_place.setdefault(place, GroupPlan(place, "own"))
        group.members.append(name)
        if inside is None or place == inside or _reads(inside, place, next(iter(blocks)), blocks):
            group.inputs.append(name)
    return share_balance(by_place.values())


def _blocks(model: nn.Module) -> Iterator[tuple[tuple[str, int], _Block]]:
    """The entries of lists that have an attention inside, where no smaller entry has it: by list and place."""
    entries = {
        (name, at): module
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        for at, module in enumerate(modules)
        if any(inner and _is_attention(part) for inner, part in module.named_modules())
    }
    for (name, at), module in entries.items():
        if any(other.startswith(f"{name}.{at}.") for other, _ in entries):
            continue
        attentions = tuple(inner for inner, part in module.named_modules() if inner and _is_attention(part))
        linear = tuple(inner for inner, part in module.named_modules() if hasattr(part, "in_features"))
        adaptive = (
            own
            for child, part in module.named_children()
            if not hasattr(part, "in_features") and child not in attentions
            if len(own := [inner for inner in linear if inner.startswith(f"{child}.")]) == 1
        )
        yield (name, at), _Block(attentions, linear, frozenset(inner for own in adaptive for inner in own))


def _is_attention(module: nn.Module) -> bool:
    """Whether diffusers lets its users choose how a module attends, as it does for every attention."""
    return hasattr(module, "set_processor") or hasattr(module, "to_q")


def _inside(name: str, stacks: Sequence[Stack], blocks: dict[tuple[str, int], _Block]) -> Place | None:
    place = find_place(name, stacks)
    return None if place is None or (place.stack, place.layer) not in blocks else place


def _place_of_group(
    inside: Place, stacks: Sequence[Stack], blocks: dict[tuple[str, int], _Block], granularity: str
) -> Place:
    block = blocks[inside.stack, inside.layer]
    if granularity == "matrix" or inside.module in block.adaptive:
        return inside
    if granularity == "network":
        return Place(stacks[0].name, 0, "network")
    within = "block" if granularity == "block" else block.sublayer_of(inside.module)
    return Place(inside.stack, inside.layer, within)


def _reads(inside: Place, group: Place, first: tuple[str, int], blocks: dict[tuple[str, int], _Block]) -> bool:
    """Whether a module in a block is given its group's own input."""
    at = inside.stack, inside.layer
    if group.module == "network":
        return at == first and inside.module in blocks[at].read_in("block")
    return inside.module in blocks[at].read_in(group.module)
