"""What has a router of its own, by the names of modules alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lamella.backbones import Place, Stack, find_place, siblings_with_same_input
from lamella.backbones.blocks import CROSS_ATTENTION
from lamella.errors import LamellaError

_ATTENTION = ("attention", "attn")


@dataclass
class UnitPlan:
    """The modules that share one decision.

    Attributes:
        place: the unit's stack, block, and name inside it: "network", "block", a sub-layer's or a matrix's name.
        input: what a row of its input is: a token of its "own" stack, a token of the "encoder", or a "row" of which
            nothing is known, outside the blocks.
        members: the adapted modules that its weights are for, in the model's order.
        reads: those of them that are given the unit's own input; their LoRAs' outputs are what the router reads.
    """

    place: Place
    input: str
    members: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The unit's dotted name in the model."""
        if self.place.module.startswith("network"):
            return f"{self.place.stack}.{self.place.module}"
        inside = "" if self.place.module == "block" else f".{self.place.module}"
        return f"{self.place.stack}.{self.place.layer}{inside}" if self.place.stack else self.place.module


def plan_units(
    adapted: Sequence[str], linear: Sequence[str], stacks: Sequence[Stack], granularity: str, by_token: bool
) -> list[UnitPlan]:
    """Groups the adapted modules into units.

    A unit's input is what the first linear module in it is given, adapted or not; the modules named as its siblings
    (query, key and value; gate and up) are given the same. Modules outside the blocks decide by themselves for each row
    of their input, so that they may lie anywhere.

    Args:
        adapted: names of the modules that any LoRA adapts, in the model's order.
        linear: names of all linear modules, in the model's order.
        stacks: the model's stacks of blocks.
        granularity: "matrix", "sublayer", "block" or "network".
        by_token: whether each token decides for itself, so that what is given the encoder's states needs a unit of its
            own: its tokens are others.

    Returns:
        The units in the order of their first members.
    """
    units: dict[tuple[str, int, str], UnitPlan] = {}
    entries = {name: key for name, key in _entries(linear, stacks, granularity, by_token).items() if name in adapted}
    for name in adapted:
        place, input_ = _unit_of(name, stacks, granularity, by_token)
        key = _key(place)
        unit = units.setdefault(key, UnitPlan(place, input_))
        unit.members.append(name)
        if granularity == "matrix" or input_ == "row" or entries.get(name) == key:
            unit.reads.append(name)
    return list(units.values())


def _key(place: Place) -> tuple[str, int, str]:
    return place.stack, place.layer, place.module


def _unit_of(name: str, stacks: Sequence[Stack], granularity: str, by_token: bool) -> tuple[Place, str]:
    """A module's unit, and what the unit's input is."""
    place = find_place(name, stacks)
    if place is None:
        return Place("", 0, name), "row"
    if granularity == "matrix":
        return place, "encoder" if place.reads_encoder else "own"
    own = "encoder" if by_token and place.reads_encoder else "own"
    of_encoder = " of the encoder's states" if own == "encoder" else ""
    if granularity == "network":
        return Place(place.stack, 0, f"network{of_encoder}"), own
    inside = "block" if granularity == "block" else sublayer_of(place.module)
    return Place(place.stack, place.layer, f"{inside}{of_encoder}"), own


def sublayer_of(module: str) -> str:
    """The sub-layer of a block that a module belongs to: its attention, by name, or else the "mlp"."""
    parts = module.split(".")
    for index, part in enumerate(parts[:-1]):
        if part in CROSS_ATTENTION or any(word in part.lower() for word in _ATTENTION):
            return ".".join(parts[: index + 1])
    return "mlp"


def _entries(
    linear: Sequence[str], stacks: Sequence[Stack], granularity: str, by_token: bool
) -> dict[str, tuple[str, int, str]]:
    """The modules that are given the input of their unit, each with the unit."""
    entries: dict[str, tuple[str, int, str]] = {}
    begun: set[tuple[str, int, str]] = set()
    for name in linear:
        place = find_place(name, stacks)
        if place is None:
            continue
        unit, _ = _unit_of(name, stacks, granularity, by_token)
        key = _key(unit)
        if key in begun:
            continue
        begun.add(key)
        root = name.removesuffix(place.module)
        entries |= {
            root + sibling: key
            for sibling in siblings_with_same_input(place)
            if root + sibling in linear and _key(_unit_of(root + sibling, stacks, granularity, by_token)[0]) == key
        }
    return entries


def refuse_flatten_on_decoder(stack: str) -> None:
    """Raises: a flattened sequence is read to its end."""
    raise LamellaError(
        f"router_input='flatten' reads a sequence to its end, and {stack} is a decoder, which would see what it has yet"
        " to say. Use router_input='mean' (which reads the prompt) or 'token'."
    )
