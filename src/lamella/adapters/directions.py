"""What a LoRA's weights say about the inputs it is for: the directions that it answers to, the strongest first."""

import torch
from torch import Tensor

from lamella.adapters.source import Factors


def directions(factors: Factors) -> Tensor:
    """``S V^T`` of the delta ``s B A = U S V^T``, ``(r, in)`` in float32: orthogonal rows, each as long as its
    singular value.

    U does not change a length, so that ``|S V^T x|`` is the length of what the LoRA puts out for x, and the first row,
    normalised, is the direction of the input that it answers to most. With ``B = Q R`` it is a decomposition of
    ``s R A`` alone, never of a matrix of the weight's size.

    Source: SpectR (arXiv 2504.03454, section 3); the first row is the prototype of Arrow (arXiv 2405.11157, section 3).
    """
    _, R = torch.linalg.qr(factors.B.double())  # (min(out, r), r)
    _, S, V = torch.linalg.svd(factors.scaling * R @ factors.A.double(), full_matrices=False)  # (n,), (n, in)
    found = factors.A.new_zeros(factors.A.shape, dtype=torch.float32)  # (r, in)
    found[: len(S)] = S[:, None] * V
    return found
