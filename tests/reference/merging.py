"""Merges of LoRAs written to be read: full deltas, full SVDs, one entry at a time. Nothing here imports lamella.

``deltas`` has for each module the delta ``(out, in)`` of each LoRA, of zeros where a LoRA has none.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ZERO = 1e-9

Deltas = Mapping[str, Sequence[Tensor]]


def mean(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0]) / len(parts)


def trimmed(vector: Sequence[float], density: float) -> list[float]:
    """The largest entries stay, the others are zero."""
    kept = sorted(range(len(vector)), key=lambda place: -abs(vector[place]))[: max(1, int(density * len(vector)))]
    return [value if place in kept else 0.0 for place, value in enumerate(vector)]


def ties(vectors: Sequence[Sequence[float]], density: float) -> list[float]:
    """One vector for each LoRA: trim it, elect the sign of each entry, average those that have it."""
    vectors = [trimmed(vector, density) for vector in vectors]
    merged = []
    for values in zip(*vectors, strict=True):
        sign = 1 if sum(values) > 0 else -1
        agreeing = [value for value in values if value * sign > ZERO]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


def ties_of_matrices(parts: Sequence[Tensor], density: float) -> Tensor:
    return torch.tensor(ties([part.flatten().tolist() for part in parts], density), dtype=torch.float64).view_as(
        parts[0]
    )


def knots(deltas: Deltas, density: float) -> dict[str, Tensor]:
    """The SVD of ``[D_1 ... D_K]`` of each module; TIES of one vector for each LoRA, S V_i of all modules."""
    bases, parts = {}, {}
    for module, matrices in deltas.items():
        u, s, v = torch.linalg.svd(torch.cat(list(matrices), dim=1))
        rank = sum(1 for value in s.tolist() if value > ZERO)
        bases[module] = u[:, :rank]
        width = matrices[0].shape[1]
        parts[module] = [torch.diag(s[:rank]) @ v[:rank, i * width : (i + 1) * width] for i in range(len(matrices))]
    count = len(next(iter(parts.values())))
    merged = ties([[x for module in parts for x in parts[module][i].flatten().tolist()] for i in range(count)], density)
    result = {}
    for module, basis in bases.items():
        size = parts[module][0].numel()
        rows, merged = torch.tensor(merged[:size], dtype=torch.float64), merged[size:]
        result[module] = basis @ rows.view_as(parts[module][0])
    return result


def whitened(columns: Tensor) -> Tensor:
    """``U (UᵀU)^(-1/2)``: uncorrelated columns, as near to these as can be."""
    values, vectors = torch.linalg.eigh(columns.mT @ columns)
    roots = torch.tensor([value**-0.5 if value > ZERO else 0.0 for value in values.tolist()], dtype=torch.float64)
    return columns @ vectors @ torch.diag(roots) @ vectors.mT


def tsv(matrices: Sequence[Tensor], kept: int) -> Tensor:
    """The first singular vectors of each matrix, side by side, whitened, and multiplied again."""
    us, ss, vs = [], [], []
    for matrix in matrices:
        u, s, v = torch.linalg.svd(matrix)
        for place in range(min(kept, len(s))):
            if s[place] > ZERO:
                us.append(u[:, place])
                ss.append(s[place])
                vs.append(v[place])
    return whitened(torch.stack(us, dim=1)) @ torch.diag(torch.stack(ss)) @ whitened(torch.stack(vs, dim=1)).mT


def core_matrices(
    loras: Sequence[tuple[Tensor, Tensor, float] | None],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """U_B ``(out, p)``, each LoRA's ``U_Bᵀ s B A V_A`` and V_A ``(in, q)``, of A, B and s of each LoRA."""
    Bs = torch.cat([lora[1] for lora in loras if lora], dim=1)
    As = torch.cat([lora[0] for lora in loras if lora])
    U = torch.linalg.svd(Bs)[0][:, : min(Bs.shape)]
    V = torch.linalg.svd(As)[2].mT[:, : min(As.shape)]
    cores = []
    for lora in loras:
        delta = lora[2] * lora[1] @ lora[0] if lora else torch.zeros(len(Bs), As.shape[1], dtype=torch.float64)
        cores.append(U.mT @ delta @ V)
    return U, cores, V
