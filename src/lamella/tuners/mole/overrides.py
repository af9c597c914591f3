"""Weights in place of the routers', for the forwards inside a context: some LoRAs left out, or all weights fixed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lamella.errors import LamellaError
from lamella.routing import CallTracker, find_tracker
from lamella.tuners.mole.layer import MoleLinear

Weights = Mapping[str, float] | Sequence[Mapping[str, float]] | Sequence[float] | Sequence[Sequence[float]] | Tensor


@contextmanager
def masked_experts(model: nn.Module, drop: Sequence[str]) -> Iterator[None]:
    """Leaves some LoRAs out: the others' weights grow in proportion, as if the dropped logits were minus infinity.

    Gates (``score="sigmoid"``) of the others stay as they are. The routers go on reading all LoRAs, and nothing is
    retrained (MOLE, section 3.4). It holds for what is called from
    inside the ``with`` statement, and not for other threads, coroutines and generators. A thread that is started inside
    takes part if it is started with a copy of the context (``contextvars.copy_context().run``).

    Args:
        model: a model with an active MOLE adapter.
        drop: names of LoRAs.

    Raises:
        LamellaError: no MOLE adapter, a name it does not have, or no LoRA left.
    """
    adapter, names = _active(model)
    _refuse_unknown(drop, names, "drop")
    tracker = _tracker(model)
    before = tracker.override(adapter)
    allowed = torch.tensor([name not in drop for name in names])
    allowed = allowed if before.allowed is None else allowed & before.allowed
    if not bool(allowed.any()):
        raise LamellaError(f"drop leaves none of the {len(names)} LoRAs {', '.join(names)}; keep at least one.")
    override = replace(before, allowed=allowed)
    if override.leaves_nothing:
        raise LamellaError("drop leaves only LoRAs whose fixed weights are 0, so there is nothing to share out.")
    with tracker.overrides.saying(override):
        yield


@contextmanager
def fixed_weights(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Fixes the LoRAs' weights, in every group; the routers are not asked.

    They are used as they are: ``{"a": 1, "b": 1}`` adds two LoRAs, ``{"a": 0.5, "b": 0.5}`` is their mean, and
    ``{"a": -1}`` goes the other way. They hold where ``masked_experts`` would; inside that, the LoRAs left out stay
    out, and what they are given here is shared out in proportion.

    Args:
        model: a model with an active MOLE adapter.
        weights: by name (0 for LoRAs that are not named), the same for all sequences; a list of such dictionaries, one
            per sequence of the batch, so that each request has its own; or a tensor, an array or lists of numbers,
            ``(K,)`` or ``(batch, K)``, in the order of the config's adapters. With several rows per sequence (beams)
            they follow each other.

    Raises:
        LamellaError: no MOLE adapter, a name it does not have, another number of weights, weights that are not finite,
            or weights for nothing but LoRAs that are left out.
    """
    adapter, names = _active(model)
    fixed = _by_name(weights, names) if _is_named(weights) else _in_order(weights, names)
    if fixed.dim() not in (1, 2) or fixed.shape[-1] != len(names) or not fixed.numel():
        raise LamellaError(
            f"weights of shape {tuple(fixed.shape)} are not ({len(names)},) or (batch, {len(names)}), one for each of "
            f"{', '.join(names)}."
        )
    if not bool(torch.isfinite(fixed).all()):
        lost = [name for name, column in zip(names, fixed.unbind(-1), strict=True) if not bool(column.isfinite().all())]
        raise LamellaError(f"weights must be finite, and those of {', '.join(lost)} are not.")
    tracker = _tracker(model)
    override = replace(tracker.override(adapter), fixed=fixed)
    if override.leaves_nothing:
        raise LamellaError("weights are for nothing but LoRAs that masked_experts leaves out.")
    with tracker.overrides.saying(override):
        yield


def _is_named(weights: Any) -> TypeGuard[Mapping[str, float] | Sequence[Mapping[str, float]]]:
    rows = weights if isinstance(weights, list | tuple) and weights else [weights]
    return all(isinstance(row, Mapping) for row in rows)


def _in_order(weights: Any, names: Sequence[str]) -> Tensor:
    """Weights without names: a tensor, an array, or lists of numbers."""
    try:
        table = torch.as_tensor(weights).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LamellaError(
            f"weights={weights!r} are not numbers: give them by name, as in {{{names[0]!r}: 1.0}}, a list of such "
            f"dictionaries, or numbers in the order of {', '.join(names)}."
        ) from error
    return table if table.dtype == torch.float64 else table.float()


def _by_name(weights: Mapping[str, float] | Sequence[Mapping[str, float]], names: Sequence[str]) -> Tensor:
    rows = [weights] if isinstance(weights, Mapping) else list(weights)
    for row in rows:
        _refuse_unknown(row, names, "weights")
    try:
        table = torch.tensor([[float(row.get(name, 0.0)) for name in names] for row in rows], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise LamellaError(f"weights={weights!r} give some LoRA what is no number: {error}.") from error
    return table[0] if isinstance(weights, Mapping) else table


def _refuse_unknown(given: Mapping[str, float] | Sequence[str], names: Sequence[str], what: str) -> None:
    if isinstance(given, str):
        raise LamellaError(f"{what}={given!r} is one name; give a list of names.")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise LamellaError(f"{what} names {', '.join(map(repr, unknown))}; the composition has {', '.join(names)}.")


def _active(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """The active adapter and its LoRAs."""
    active = {
        adapter: layer.groups[adapter].names
        for layer in model.modules()
        if isinstance(layer, MoleLinear)
        for adapter in layer.active_adapters
        if adapter in layer.groups
    }
    if len(active) != 1:
        way = "activate one with set_adapter" if active else "compose LoRAs with lamella.compose first"
        raise LamellaError(
            f"{type(model).__name__} has {len(active)} active MOLE adapters, and fixed weights are for one: {way}."
        )
    return next(iter(active.items()))


def _tracker(model: nn.Module) -> CallTracker:
    tracker = find_tracker(model)
    assert tracker is not None  # every injection sets one
    return tracker
