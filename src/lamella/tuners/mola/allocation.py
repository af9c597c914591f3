"""How many experts each layer gets."""

import math
import re
from collections.abc import Sequence

from lamella.errors import LamellaError
from lamella.tuners.kinds import MOST, Count, fits

NumExperts = int | Sequence[int] | str
AUTO = "auto"

# MoLA §4.2 and its published shapes; a digit per quarter of the depth, lowest layers first.
SHAPES: dict[str, tuple[int, ...]] = {
    "rectangle": (5, 5, 5, 5),
    "triangle": (8, 6, 4, 2),
    "inverted-triangle": (2, 4, 6, 8),
    "hourglass": (8, 2, 2, 8),
    "diamond": (2, 8, 8, 2),
}


def allocate(
    num_experts: NumExperts, layers: int, expert_budget: float | None = None, needs: Sequence[float] | None = None
) -> list[int]:
    """Experts per layer.

    Layer l of L belongs to group ``l*G//L`` of a shape's G groups. With a budget the shape keeps its proportions but is
    scaled to that mean number of experts per layer, by largest remainder, at least 1 each.

    Args:
        num_experts: one number for all layers; a list with one entry per layer; groups such as "2-4-6-8"; or a shape:
            "rectangle", "triangle", "inverted-triangle", "hourglass", "diamond"; or "auto", in proportion to ``needs``.
        layers: how many layers there are.
        expert_budget: mean experts per layer that a shape is scaled to; None keeps the shape's own numbers. "auto"
            shares it out.
        needs: how much each layer needs experts, from 0, for "auto"; a layer that needs none has one.

    Returns:
        A list of ``layers`` positive integers.

    Raises:
        LamellaError: a wrong length, an unknown shape, an entry below 1, a budget where there is no shape to scale,
            "auto" without needs or without a budget.
    """
    if layers < 1:
        raise LamellaError(f"layers={layers}: an allocation needs at least one layer.")
    if num_experts == AUTO:
        return _scale(_needed(needs, layers), _given(expert_budget))
    if isinstance(num_experts, str):
        groups = _parse_shape(num_experts)
        if len(groups) > layers:
            raise LamellaError(
                f"num_experts={num_experts!r} names {len(groups)} groups but there are only {layers} "
                "layers; use a list "
                "with one entry per layer."
            )
        counts = [groups[layer * len(groups) // layers] for layer in range(layers)]
        counts = counts if expert_budget is None else _scale(counts, expert_budget)
        _refuse_uncountable(counts, num_experts)
        return counts
    if expert_budget is not None:
        raise LamellaError(
            f"expert_budget={expert_budget} scales a shape, but num_experts={num_experts!r} is explicit; "
            "drop one of them."
        )
    counts = [num_experts] * layers if isinstance(num_experts, int) else list(num_experts)
    if len(counts) != layers:
        raise LamellaError(
            f"num_experts has {len(counts)} entries but the stack has {layers} blocks; give one entry per block, or a "
            f'shape such as "2-4-6-8".'
        )
    _refuse_uncountable(counts, num_experts)
    return counts


def _given(expert_budget: float | None) -> float:
    if expert_budget is None:
        raise LamellaError("num_experts='auto' shares a budget out; give expert_budget, the mean experts per layer.")
    return expert_budget


def _needed(needs: Sequence[float] | None, layers: int) -> list[float]:
    if needs is None:
        raise LamellaError("num_experts='auto' needs a model, or how much each of its layers needs experts.")
    if len(needs) != layers or not all(math.isfinite(need) and need >= 0 for need in needs) or layers < 1:
        raise LamellaError(f"needs={list(needs)} must be one number from 0 for each of {layers} layers.")
    most = max(needs)
    return [need / most for need in needs] if most > 0 else [1.0] * layers  # nothing speaks for one before another


def _parse_shape(shape: str) -> tuple[int, ...]:
    if shape in SHAPES:
        return SHAPES[shape]
    parts = shape.split("-")
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise LamellaError(
            f"num_experts={shape!r} is not a shape; use one of {', '.join(SHAPES)}, or numbers such as '2-4-6-8'."
        )
    groups = tuple(int(part) for part in parts)
    _refuse_uncountable(groups, shape)
    return groups


def _refuse_uncountable(counts: Sequence[int], given: object) -> None:
    if not all(fits(count, Count) for count in counts):
        raise LamellaError(
            f"num_experts={given!r}: every layer needs at least one expert, as a whole number, and at most {MOST:,}."
        )


def _scale(counts: Sequence[float], expert_budget: float) -> list[int]:
    """The same proportions with a total of ``expert_budget * layers``, by largest remainder, at least 1 each."""
    if not 1 <= expert_budget <= MOST:  # nan is neither
        raise LamellaError(f"expert_budget={expert_budget} is a mean per layer; it must be from 1 to {MOST:,}.")
    total = round(expert_budget * len(counts))
    scaled = [1] * len(counts)
    free = set(range(len(counts)))
    while free:
        # Layers whose fair share is below 1 keep the one expert they are owed; the others share what is left.
        left = total - (len(counts) - len(free))
        weight = sum(counts[layer] for layer in free)
        shares = {layer: left * counts[layer] / weight for layer in free}
        below = {layer for layer, share in shares.items() if share < 1}
        if not below:
            break
        free -= below
    if free:
        for layer, share in shares.items():
            scaled[layer] = math.floor(share)
        by_remainder = sorted(shares, key=lambda layer: (math.floor(shares[layer]) - shares[layer], layer))
        for layer in by_remainder[: total - sum(scaled)]:
            scaled[layer] += 1
    return scaled
