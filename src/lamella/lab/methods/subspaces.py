"""Merges of LoRAs in subspaces that they share: KnOTS, TSV-M and Core Space. Nothing is trained.

Everything is computed between bases of what the LoRAs write and read, so that nothing is decomposed that has the size
of a weight. In the shapes, K LoRAs have the ranks r_1 to r_K, R is their sum, p = min(out, R) and q = min(in, R). A
LoRA without factors for a module has a delta of zero there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lamella.adapters import Factors
from lamella.lab.methods.compositions import Loras, Modules, composition

# What is below this share of the largest singular value or entry is zero: factors in float32 do not say more.
_ROUND_OFF = 1e-7

Coefficient = Annotated[float, Field(gt=0.0, allow_inf_nan=False, description="what the merged delta is multiplied by")]
Density = Annotated[float, Field(gt=0.0, le=1.0, description="share of the entries of each LoRA that ties keeps")]


class Shared(NamedTuple):
    """One module's deltas in bases that all LoRAs share: that of LoRA i is ``left cores[i] right``, exactly.

    Attributes:
        left: ``(out, p)``, orthonormal columns.
        cores: ``(K, p, q)``.
        right: ``(q, in)``, orthonormal rows.
        precision: of the factors, and at least float32; all of the above is in float64.
    """

    left: Tensor
    cores: Tensor
    right: Tensor
    precision: torch.dtype


@composition("knots")
def knots(
    loras: Loras,
    combination: Literal["ties", "mean"] = "ties",
    density: Density = 0.2,
    coefficient: Coefficient = 1.0,
) -> Modules:
    """KnOTS: the deltas side by side have one SVD, ``[D_1 ... D_K] = U S [V_1 ... V_K]``, and the V_i are merged.

    ``ties`` trims each LoRA to its largest entries, those of all modules together, elects the sign of each entry's sum
    and takes the mean of the entries with that sign. What is trimmed is ``S V_i``, as published, since the rows of V_i
    alone do not say how much they matter. ``mean`` is that of the deltas themselves: a linear merge does not depend on
    the basis.

    Source: Stoica et al., Model Merging with SVD to Tie the KnOTS, ICLR 2025, §4, and its code (``SVDMerger``); TIES:
    Yadav et al., NeurIPS 2023.
    """
    shared = _shared(loras)
    bases, scaled = {}, {}
    for module, (left, cores, right, _) in shared.items():
        u, _, _ = _svd(torch.cat(list(cores), dim=1))  # (p, n)
        bases[module] = left @ u  # (out, n)
        scaled[module] = u.mT @ cores @ right  # (K, n, in): S V_i, which is what U has of each delta
    parts = list(scaled.values())
    merged = _ties(parts, density) if combination == "ties" else [part.mean(0) for part in parts]
    return {
        module: _factors(bases[module], coefficient * one, space.precision)
        for (module, space), one in zip(shared.items(), merged, strict=True)
    }


@composition("tsv")
def tsv(
    loras: Loras,
    rank: Annotated[
        int | None, Field(gt=0, description="singular vectors kept of each LoRA; min(out, in) / K if absent")
    ] = None,
    coefficient: Coefficient = 1.0,
) -> Modules:
    """TSV-M: the first singular vectors of each delta, made orthogonal to those of the others, and added up.

    As published, each LoRA keeps 1/K of the singular vectors that a matrix of the weight's size has, which of LoRAs of
    low rank are all. Singular vectors without a singular value take no part; the published code, made for full
    fine-tuning, orthogonalises arbitrary ones.

    Source: Gargiulo et al., Task Singular Vectors, CVPR 2025, and its code (``compute_and_sum_svd_mem_reduction``).
    """
    merged = {}
    for module, (left, cores, right, precision) in _shared(loras).items():
        kept = rank or _share(min(len(left), right.shape[1]), len(cores))
        core = _task_singular_vectors(cores, kept)  # (p, q)
        merged[module] = _factors(left, coefficient * core @ right, precision)
    return merged


@composition("core-space")
def core_space(
    loras: Loras,
    combination: Literal["ties", "tsv", "mean"] = "ties",
    density: Density = 0.2,
    coefficient: Coefficient = 1.0,
) -> Modules:
    """Core Space: each delta is a small matrix between the singular vectors of all B and of all A, merged there.

    ``ties`` is that of `knots`, each module by itself. ``tsv`` is that of `tsv`, with 1/K of the small matrix's
    singular vectors: LoRAs of equal ranks keep all of theirs, and both methods are the same. ``mean`` is that of the
    deltas. The bases, and with them ``ties``, depend on how B and A share a delta out between them; the scalings are
    not in them.

    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025, and its code
    (``MatrixPerLayerMerger``).
    """
    merged = {}
    for module, (left, cores, right, precision) in _shared(loras).items():
        if combination == "ties":
            (core,) = _ties([cores], density)  # (p, q)
        elif combination == "tsv":
            core = _task_singular_vectors(cores, _share(min(cores[0].shape), len(cores)))
        else:
            core = cores.mean(0)
        merged[module] = _factors(left, coefficient * core @ right, precision)
    return merged


def _shared(loras: Loras) -> dict[str, Shared]:
    modules = dict.fromkeys(module for lora in loras.values() for module in lora)
    return {module: _shared_by([lora.get(module) for lora in loras.values()]) for module in modules}


def _shared_by(parts: Sequence[Factors | None]) -> Shared:
    """The singular vectors of all B side by side and of all A on top of each other, and each delta between them."""
    present = [factors for factors in parts if factors is not None]
    left = torch.linalg.svd(torch.cat([factors.B.double() for factors in present], dim=1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat([factors.A.double() for factors in present]), full_matrices=False).Vh
    cores = left.new_zeros(len(parts), left.shape[1], len(right))  # (K, p, q)
    for core, factors in zip(cores, parts, strict=True):
        if factors is not None:
            up = left.mT @ factors.B.double()  # (p, r_i)
            down = factors.A.double() @ right.mT  # (r_i, q)
            core.copy_(factors.scaling * up @ down)
    precision = torch.promote_types(present[0].A.dtype, torch.float32)
    return Shared(left, cores, right, precision)


def _ties(parts: Sequence[Tensor], density: float) -> list[Tensor]:
    """Trim, elect signs, disjoint mean.

    Args:
        parts: of each module ``(K, ...)``; those of one LoRA are trimmed together.
        density: share of a LoRA's entries that stays, the largest ones.

    Returns:
        Of each module ``(...)``, the mean of the entries that have the sign of the sum; zero where the sum is.
    """
    entries = torch.cat([part.flatten(1) for part in parts], dim=1)  # (K, N)
    count = entries.shape[1]
    sizes = entries.abs()  # (K, N)
    smallest = sizes.kthvalue(count - max(1, int(density * count)) + 1, dim=1, keepdim=True).values  # (K, 1)
    # an entry that is zero but for round-off has no sign, and would count in the mean
    entries = entries * (sizes >= smallest.clamp(min=_ROUND_OFF * float(sizes.max())))
    elected = entries.sign() == entries.sum(0).sign()  # (K, N)
    merged = (entries * elected).sum(0) / elected.sum(0).clamp(min=1)  # (N)
    split = merged.split([part[0].numel() for part in parts])
    return [one.view_as(part[0]) for one, part in zip(split, parts, strict=True)]


def _task_singular_vectors(cores: Tensor, kept: int) -> Tensor:
    """The sum ``U S V`` of the first singular vectors of all cores, U and V made orthonormal.

    Args:
        cores: ``(K, p, q)``.
        kept: how many of each.
    """
    some = [core for core in cores if core.any()] or [cores[0]]  # of zeros, any vectors would be singular ones
    us, ss, vs = zip(*map(_svd, some), strict=True)
    u = torch.cat([one[:, :kept] for one in us], dim=1)  # (p, n)
    s = torch.cat([one[:kept] for one in ss])  # (n)
    v = torch.cat([one[:kept] for one in vs])  # (n, q)
    return _orthonormal(u) * s @ _orthonormal(v)


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows (Procrustes); of dependent ones with nothing made up."""
    u, _, v = _svd(matrix)
    return u @ v


def _share(vectors: int, count: int) -> int:
    return max(1, vectors // count)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(a, n)``, S ``(n)`` and V ``(n, b)`` of a matrix ``(a, b)`` of rank n; of a matrix of zeros n is 1."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, int((s > _ROUND_OFF * s[0]).sum()))
    return u[:, :rank], s[:rank], v[:rank]


def _factors(left: Tensor, rest: Tensor, precision: torch.dtype) -> Factors:
    """The LoRA whose delta is ``left rest``, of the smallest rank that has it.

    Args:
        left: ``(out, n)``, orthonormal columns.
        rest: ``(n, in)``.
        precision: of the factors.
    """
    u, s, v = _svd(rest)  # (n, r), (r), (r, in)
    return Factors(A=v.to(precision), B=(left @ u * s).to(precision), scaling=1.0)
