"""Experts whose tokens go to another expert behind a linear aligner."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from lamella.backbones.moe import Expert
from lamella.similarity.compression.calibration import LayerSample
from lamella.similarity.compression.criteria.registry import Ranking, criterion
from lamella.similarity.compression.criteria.replacing import least_damage, replacement_damage

_NEAREST = 2  # experts to which an aligner is fitted, for each that might go
_TOKENS = 1024
_DECAY = 1e-3
_STEPS = 20


@criterion("aligned", "replace", power=2)
def aligned(sample: LayerSample, seed: int) -> Ranking:
    """``sum_{x in X_j} g_j(x)^2 |f_j(x) - f_e(A x + b)|^2``, for the A, b and e, an expert that is left, of the least.

    A and b are fitted to three of four tokens, from the identity and with a little decay to it, for the two experts of
    least damage without an aligner; the damage is that of the fourth token. Where an aligner does not lessen it there
    is none. A is folded into what e reads with, so that it costs no time: j stores a gate and up of its own, and shares
    e's down-projection, and so gives up a third of its numbers where an expert that goes otherwise gives up all.
    """
    damage = replacement_damage(sample)  # (E, E)
    aligners: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for gone in range(sample.num_experts):
        here = torch.where(sample.gates[:, gone] != 0)[0][:_TOKENS]
        others = damage[gone].clone()
        others[gone] = float("inf")
        for to in others.argsort()[:_NEAREST].tolist() if len(here) >= 8 else ():
            weights = sample.share[here] * sample.gates[here, gone].square()
            matrix, bias, left = _fitted(sample, gone, to, here, weights)
            if left < 1:
                aligners[gone, to] = matrix, bias
                damage[gone, to] *= left
    return least_damage(damage, aligners)


def _fitted(sample: LayerSample, gone: int, to: int, here: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, float]:
    """A ``(h, h)``, b ``(h,)``, and what share of the damage is left on tokens that they were not fitted to."""
    wide = torch.promote_types(sample.x.dtype, torch.float32)
    source, target = (_copy(sample.layer.experts[one], wide) for one in (gone, to))
    x, weights = sample.x[here].to(wide), weights.to(wide)
    wanted, last = source(x), torch.arange(len(here), device=x.device) % 4 == 3
    hidden = x.shape[1]
    identity = torch.eye(hidden, dtype=wide, device=x.device)
    matrix = identity.clone().requires_grad_()
    bias = torch.zeros(hidden, dtype=wide, device=x.device, requires_grad=True)

    def error(rows: Tensor, moved: Tensor) -> Tensor:
        return weights[rows] @ (wanted[rows] - target(moved)).square().sum(1)

    with torch.no_grad():
        start = error(~last, x[~last]).clamp_min(1e-30)
    optimiser = torch.optim.LBFGS([matrix, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def step() -> float:
        optimiser.zero_grad()
        loss = error(~last, linear(x[~last], matrix, bias)) / start + _DECAY * (matrix - identity).square().sum()
        loss.backward()
        return loss.item()

    with torch.enable_grad():
        optimiser.step(step)
    with torch.no_grad():
        before, after = error(last, x[last]), error(last, linear(x[last], matrix, bias))
    return matrix.detach(), bias.detach(), float(after / before.clamp_min(1e-30))


def _copy(expert: Expert, dtype: torch.dtype) -> Expert:
    copied = expert.copied()
    for matrix in copied.matrices.values():
        matrix.data = matrix.data.to(dtype)
    return copied
