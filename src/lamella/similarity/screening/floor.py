"""The error that no aligner can beat: what of a source's outputs lies outside everything the target can put out."""

import torch
from torch import Tensor

from lamella.backbones.moe import Expert


def unreachable_directions(down: Tensor) -> Tensor:
    """An orthonormal basis ``(d, d - rank)``, float64, of the directions that no output of ``down (d, ff)`` has.

    Whatever the expert's input, its output less its bias lies in the column space of its down-projection; these are
    the directions orthogonal to that space. Only a dependence to the last bits of float64 counts as a lower rank.
    """
    matrix = down.detach().double()
    d, ff = matrix.shape
    basis, triangle = torch.linalg.qr(matrix, mode="complete")  # (d, d), (d, ff)
    rank = min(d, ff)
    diagonal = triangle.diagonal().abs()
    precision = torch.finfo(torch.float64).eps * max(d, ff)
    if diagonal.numel() and diagonal.min() <= precision * diagonal.max():
        # without pivoting a small diagonal says that the rank may be lower, but not by how much
        basis, values, _ = torch.linalg.svd(matrix, full_matrices=True)
        rank = int((values > precision * values.max()).sum())
    return basis[:, rank:]  # (d, d - rank)


def floor_energy(outputs: Tensor, target: Expert, directions: Tensor) -> Tensor:
    """Squared error ``(..., n)`` that is left of every row of ``outputs (..., n, d)`` whatever the target is given.

    Args:
        outputs: what the source puts out.
        target: its ``down_bias`` is all that it can put out in ``directions``.
        directions: `unreachable_directions` of the target's down-projection, ``(d, d - rank)``.
    """
    if target.down_bias is not None:
        outputs = outputs - target.down_bias.detach().to(outputs)  # (..., n, d)
    return (outputs @ directions.to(outputs)).square().sum(-1)  # (..., n)
