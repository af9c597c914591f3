"""What has a router of its own in a model that makes images, by the structure of diffusers' models."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn
from transformers import PreTrainedModel

from lamella.backbones import Place, Stack, find_place, locate_stacks
from lamella.tuners.mole.plan import GroupPlan, plan_groups, share_balance

_QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
# In a block whose MLP runs beside its attention it is given the same normed input, and runs first.
_BESIDE_ATTENTION = "proj_mlp"
# Rows of a block's linear maps, by what diffusers calls these: the block's own tokens, and words that run beside them.
_OWN, _WORDS, _ADDED = "", "words", "added words"
_OF_OWN = ("to_q", "to_k", "to_v", "to_out", "ff", "ffn", "feed_forward", "mlp", "img_mlp", "proj_mlp", "proj_out")
_OF_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "txt_mlp")


@dataclass(frozen=True)
class _Block:
    """A transformer block, by the names inside it.

    Attributes:
        attentions: in its order; the first is what its tokens do among themselves.
        linear: its linear maps, in its order.
        adaptive: those of its norms, which are given the time embedding before the block's own input is there.
        rows: which rows each module is given, where that makes a difference: the block's own tokens, or words; None
            where that is not known.
    """

    attentions: tuple[str, ...]
    linear: tuple[str, ...]
    adaptive: frozenset[str]
    rows: Mapping[str, str | None]

    def sublayer_of(self, module: str) -> str:
        """The attention that a linear map belongs to, or the "mlp"."""
        return next((name for name in self.attentions if module.startswith(f"{name}.")), "mlp")

    def read_in(self, sublayer: str, rows: str) -> list[str]:
        """The linear maps that are given what a sub-layer is given of such rows, or the block where it is "block"."""
        within = self.attentions[0] if sublayer == "block" and rows == _OWN else sublayer
        inside = [
            name
            for name in self.linear
            if self.rows[name] == rows and name not in self.adaptive and within in ("block", self.sublayer_of(name))
        ]
        if rows == _WORDS:
            return inside
        if rows == _ADDED:
            return [name for name in inside if name.rpartition(".")[2].startswith("add_")] or inside[:1]
        if within != self.attentions[0]:  # a further attention reads the image in its queries alone
            return inside[:1]
        same = [name for name in inside if name.removeprefix(f"{within}.") in _QUERY_KEY_VALUE] or inside[:1]
        return [*same, _BESIDE_ATTENTION]


def plan_groups_of(
    model: nn.Module, adapted: Sequence[str], granularity: str, by_token: bool, alone: Container[str] = ()
) -> list[GroupPlan]:
    """Groups the adapted modules of one component into groups that each decide for a whole sample, or by token.

    A block's router reads what its self-attention is given. What lies outside the blocks, and what is given the time
    embedding, decides by itself.

    By token, those share a decision that are given the same tokens: a block's own (the places of an image), the words
    that its cross-attention reads, or those that run through the block beside the image. One router for the network is
    one for each list of blocks, since a UNet's lists have images of different sizes. What is not known to be given any
    of these decides by itself.

    Args:
        model: a denoiser of diffusers, or a text encoder of transformers.
        adapted: names of the modules that any LoRA adapts, in the model's order.
        granularity: "matrix", "sublayer", "block" or "network".
        by_token: whether each token decides for itself.
        alone: modules that decide by themselves wherever they lie.
    """
    if isinstance(model, PreTrainedModel):
        linear = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
        groups = plan_groups(adapted, linear, locate_stacks(model), granularity, by_token, alone)
        for group in groups:
            group.input = "own"  # outside the blocks, too, a row is a sample
        return groups
    blocks = dict(_blocks(model, by_token))
    stacks = [
        Stack(name, "encoder", max(at for stack, at in blocks if stack == name) + 1, "its attention")
        for name in dict.fromkeys(stack for stack, _ in blocks)
    ]
    by_place: dict[Place, GroupPlan] = {}
    for name in adapted:
        inside = None if name in alone else _inside(name, stacks, blocks)
        apart = Place("", 0, name), None, True
        place, rows, reads = apart if inside is None else _group_of(inside, blocks, granularity, by_token)
        plan = by_place.setdefault(place, GroupPlan(place, "encoder" if rows == _WORDS else "own"))
        plan.members.append(name)
        if reads:
            plan.inputs.append(name)
    return share_balance(by_place.values())


def _blocks(model: nn.Module, by_token: bool) -> Iterator[tuple[tuple[str, int], _Block]]:
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
        attentions = {inner: part for inner, part in module.named_modules() if inner and _is_attention(part)}
        linear = tuple(inner for inner, part in module.named_modules() if hasattr(part, "in_features"))
        adaptive = (
            own
            for child, part in module.named_children()
            if not hasattr(part, "in_features") and child not in attentions
            if len(own := [inner for inner in linear if inner.startswith(f"{child}.")]) == 1
        )
        rows = {inner: _rows_of(inner, attentions) if by_token else _OWN for inner, _ in module.named_modules()}
        yield (name, at), _Block(tuple(attentions), linear, frozenset(chain.from_iterable(adaptive)), rows)


def _rows_of(module: str, attentions: Mapping[str, nn.Module]) -> str | None:
    """Which rows a map in a block is given; None where that is not known."""
    around = next((name for name in attentions if module.startswith(f"{name}.")), None)
    kind = module.removeprefix(f"{around}.").partition(".")[0]
    if kind in _OF_ADDED:
        return _ADDED
    if kind not in _OF_OWN or around is None or kind not in ("to_k", "to_v"):
        return _OWN if kind in _OF_OWN else None
    first = next(iter(attentions))
    crosses = getattr(attentions[around], "is_cross_attention", None if around != first else False)
    if crosses:
        crossing = [name for name, one in attentions.items() if getattr(one, "is_cross_attention", False)]
        return _WORDS if around == crossing[0] else None  # a further one may read other words
    return None if crosses is None else _OWN


def _is_attention(module: nn.Module) -> bool:
    """Whether diffusers lets its users choose how a module attends, as it does for every attention."""
    return hasattr(module, "set_processor") or hasattr(module, "to_q")


def _inside(name: str, stacks: Sequence[Stack], blocks: dict[tuple[str, int], _Block]) -> Place | None:
    place = find_place(name, stacks)
    return None if place is None or (place.stack, place.layer) not in blocks else place


def _group_of(
    inside: Place, blocks: dict[tuple[str, int], _Block], granularity: str, by_token: bool
) -> tuple[Place, str | None, bool]:
    """The group of a module in a block, which rows it is given, and whether these are the group's own input."""
    at = inside.stack, inside.layer
    block = blocks[at]
    rows = block.rows[inside.module]
    if granularity == "matrix" or inside.module in block.adaptive or rows is None:
        return inside, rows, True
    within = block.sublayer_of(inside.module) if granularity == "sublayer" else "block"
    reads, of_rows = inside.module in block.read_in(within, rows), f" of the {rows}" if rows else ""
    if granularity != "network":
        return Place(*at, within + of_rows), rows, reads
    first = next(other for other in blocks if not by_token or other[0] == inside.stack)
    return Place(first[0], 0, f"network{of_rows}"), rows, reads and at == first
