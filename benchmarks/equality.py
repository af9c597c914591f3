"""Methods are compared before they are timed: a form that computes something else has no speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from lamella.errors import LamellaError

# float64 rounding through a dozen layers stays below 1e-12; float32 anywhere would show as 1e-7
TOLERANCE = 1e-9


class Equality(BaseModel):
    """The largest differences between two forms in float64, relative to the largest entry of the tensor.

    Attributes:
        output: of the output.
        gradient: over all trained tensors.
        tolerance: above which nothing is timed.
        tensors: how many gradients were compared.
    """

    output: float
    gradient: float
    tolerance: float
    tensors: int


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Equality:
    """Compares an ``output`` and gradients by name.

    Raises:
        LamellaError: they differ by more than float64 rounding, or have not the same names.
    """
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())[0]
        raise LamellaError(f"Only one of two forms to compare has {odd!r}, so nothing was timed.")
    differences = {name: _difference(ours[name], theirs[name]) for name in ours}
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE:
        raise LamellaError(
            f"Two forms that should agree differ by {differences[worst]:.3g} in {worst} (float64, relative to its "
            f"largest entry; allowed is {TOLERANCE:g}), so nothing was timed. This is a defect of lamella: please "
            "report it with the settings of this run."
        )
    output = differences.pop("output")
    return Equality(output=output, gradient=max(differences.values()), tolerance=TOLERANCE, tensors=len(differences))


def worst_of(compared: Sequence[Equality]) -> Equality:
    """Several comparisons as one: their largest differences, and the gradients of all."""
    return Equality(
        output=max(each.output for each in compared),
        gradient=max(each.gradient for each in compared),
        tolerance=TOLERANCE,
        tensors=sum(each.tensors for each in compared),
    )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or ours.dtype != torch.float64 or theirs.dtype != torch.float64:
        raise LamellaError(
            f"Two forms are compared in float64 and in one shape, not {ours.dtype} {tuple(ours.shape)} with "
            f"{theirs.dtype} {tuple(theirs.shape)}, so nothing was timed."
        )
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return math.inf
    largest = theirs.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((ours - theirs).abs().max() / largest)
