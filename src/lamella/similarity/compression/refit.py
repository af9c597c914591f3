"""The down-projections that are left, fitted anew to what the whole layer put out."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.backbones.moe import Expert, MoELayer
from lamella.similarity.compression.calibration import LayerSample

RIDGE = 0.1  # chosen on validation documents (docs/evidence/compression-criteria.md)
_SWEEPS = 4


@torch.no_grad()
def refit(sample: LayerSample, small: MoELayer, ridge: float = RIDGE, sweeps: int = _SWEEPS) -> None:
    """Changes the down-projections D_e of a smaller layer in place, one after the other, to lessen

    ``sum_x |y(x) - sum_e g_e(x) D_e h_e(x)|^2 + ridge * s_e |D_e - D_e before|^2``

    with y what the whole layer's experts put out, g the smaller layer's gates, h the hidden units of its experts, and
    s_e the mean over the units of ``sum_x (g_e h_e)^2``, so that ``ridge`` has no unit. Sums are over the sample,
    in which experts that the text seldom uses have as many tokens as others: other text may use them more. Several
    sweeps of exact solutions for one expert, given the others (block coordinate descent).

    Args:
        sample: of the whole layer.
        small: the same layer with fewer experts.
        ridge: how far the old weights are trusted; more where the text is small.
        sweeps: over all experts.
    """
    wide = torch.float64
    parts = _parts(small, small_gates(sample, small))
    left = whole_output(sample)  # (N, h), what no expert makes yet
    before, fits, rows = [], [], []
    for part in parts:
        expert, gates = part[0][0], torch.stack([gates for _, gates in part])  # gates (P, N)
        here = torch.where((gates != 0).any(0))[0]
        each = [one.hidden(sample.x[here]).to(wide) * weights[here, None] for one, weights in part]
        units = torch.stack(each).sum(0)  # (n, ff)
        left[here] -= units @ expert.down.to(wide).T
        if expert.down_bias is not None:
            left[here] -= gates.sum(0)[here, None] * expert.down_bias.to(wide)
        before.append(expert.down.to(wide).clone())
        fits.append(_Ridge(units, ridge))
        rows.append(here)
    now = [down.clone() for down in before]
    for _ in range(sweeps):
        for e, here in enumerate(rows):
            moved = (now[e] - before[e]).T  # (ff, h)
            step = fits[e].solve(left[here] + fits[e].units @ moved) - moved
            now[e] += step.T
            left[here] -= fits[e].units @ step
    for part, down in zip(parts, now, strict=True):
        part[0][0].down.copy_(down)


class _Ridge:
    """``argmin_Z |Y - U Z|^2 + trust |Z|^2`` for units U ``(n, ff)`` and any Y ``(n, h)``; trust is ``ridge`` times the
    mean over units of their sum of squares. What is factored is the smaller of U U' and U' U.
    """

    def __init__(self, units: Tensor, ridge: float) -> None:
        self.units = units
        self.few = len(units) < units.shape[1]
        gram = units @ units.T if self.few else units.T @ units
        trust = ridge * units.square().sum(0).mean() + 1e-30
        self.factor = torch.linalg.cholesky(gram + trust * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))

    def solve(self, wanted: Tensor) -> Tensor:
        """Z ``(ff, h)``."""
        if self.few:
            return self.units.T @ torch.cholesky_solve(wanted, self.factor)
        return torch.cholesky_solve(self.units.T @ wanted, self.factor)


def whole_output(sample: LayerSample) -> Tensor:
    """What the layer's experts put out together for each token, ``(N, h)`` float64."""
    total = torch.zeros_like(sample.x, dtype=torch.float64)
    for expert in range(sample.num_experts):
        here = torch.where(sample.gates[:, expert] != 0)[0]
        total[here] += sample.gates[here, expert, None] * sample.layer.experts[expert](sample.x[here]).double()
    return total


def small_gates(sample: LayerSample, small: MoELayer) -> Tensor:
    """The gates of a smaller layer for the same tokens, ``(N, E of the smaller one's router)``."""
    return LayerSample(small, sample.x, sample.share).gates


def _parts(small: MoELayer, gates: Tensor) -> list[list[tuple[Expert, Tensor]]]:
    """For each down-projection the experts that have it, behind aligners of their own, if their hidden units are any.

    Beside each its gates ``(N,)``: the sum over those it stands for.
    """
    parts: dict[int, dict[int, tuple[Expert, Tensor]]] = {}
    for index in range(small.num_experts):
        expert = small.experts[index]
        if expert.down.numel():
            part, key = parts.setdefault(expert.down.data_ptr(), {}), expert.up.data_ptr()
            already = part[key][1] if key in part else torch.zeros_like(gates[:, 0])
            part[key] = expert, already + gates[:, index]
    return [list(part.values()) for part in parts.values()]
