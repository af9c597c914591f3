"""The error that trained linear aligners will leave, foretold in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.aligners import IDENTITY_SCALES
from lamella.backbones.moe import Expert

# Both were chosen on one seed of tiny-moe's news; half or twice as much ranks its pairs no worse than by .02.
RIDGE = 0.3  # of the linear fit, over the mean square of an input feature
STIFFNESS = 0.5  # what a direction of the down-projection needs to be half reached, over the source's mean
_EVERY = 4  # of the tokens one is asked where an aligner starts


@dataclass(frozen=True, eq=False)
class Training:
    """The training tokens of S sources, padded to the same number m.

    Attributes:
        x: ``(S, m, h)``.
        y: outputs of the sources, ``(S, m, d)``.
        real: not padded, ``(S, m, 1)``.
        stiffness: of each source, ``(S,)``, see `stiffness`.
    """

    x: Tensor
    y: Tensor
    real: Tensor
    stiffness: Tensor

    def __getitem__(self, rows: list[int]) -> Training:
        return Training(self.x[rows], self.y[rows], self.real[rows], self.stiffness[rows])

    def fit(self, x: Tensor) -> Tensor:
        """Ridge regression on inputs and a constant, as a matrix ``(S, n, m)``: from values at the training tokens to
        the fitted values at tokens ``x (S, n, h)``.
        """
        inputs, others = (torch.nn.functional.pad(one, (0, 1), value=1.0) for one in (self.x, x))  # (S, ., h + 1)
        inputs = inputs * self.real
        gram = inputs.mT @ inputs  # (S, h + 1, h + 1)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)  # a view
        diagonal += RIDGE * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
        return others @ torch.linalg.solve(gram, inputs.mT)


def stiffness(source: Expert) -> Tensor:
    """From how much energy on the target's down-projection has a direction that an aligner half reaches."""
    return STIFFNESS * source.down.detach().float().square().sum(-1).mean()


def predicted_energy(training: Training, fit: Tensor, x: Tensor, y: Tensor, target: Expert) -> Tensor:
    """Squared error ``(S, n)`` that a linear aligner before the target is expected to leave at tokens ``x (S, n, h)``.

    An aligner starts as the multiple of the identity that errs least. What is wrong there, and is linear in the input,
    it can take away as far as the target's outputs go that way: with D the target's down-projection and λ the source's
    stiffness, ``(y − f(cx)) − D (Dᵀ D + λ)⁻¹ Dᵀ fit(y − f(cx))``.

    Args:
        training: the tokens that aligners would be trained on.
        fit: its `fit` at ``x``.
        x: inputs of other tokens.
        y: what the sources put out there, ``(S, n, d)``.
        target: the replacement.
    """
    some = training.x[:, ::_EVERY], training.y[:, ::_EVERY], training.real[:, ::_EVERY]
    scale = _best_scale(*some, target)  # (S, 1, 1)
    wrong = (training.y - outputs(target, scale * training.x)) * training.real  # (S, m, d)
    basis, strength, _ = torch.linalg.svd(target.down.detach().float(), full_matrices=False)  # (d, r), (r,)
    energy = strength.square()
    reached = energy / (energy + training.stiffness[:, None]).clamp_min(torch.finfo(energy.dtype).tiny)  # (S, r)
    taken = ((fit @ wrong) @ basis * reached[:, None]) @ basis.mT  # (S, n, d)
    return (y - outputs(target, scale * x) - taken).square().sum(-1)


def outputs(expert: Expert, x: Tensor) -> Tensor:
    """What an expert puts out for ``x (..., h)``, computed in its own precision, in float32."""
    return expert(x.to(expert.down.dtype)).float()


def _best_scale(x: Tensor, y: Tensor, real: Tensor, target: Expert) -> Tensor:
    """The multiple of the identity, ``(S, 1, 1)``, from which a linear aligner starts."""
    errors = [((outputs(target, one * x) - y) * real).square().sum((1, 2)) for one in IDENTITY_SCALES]
    return x.new_tensor(IDENTITY_SCALES)[torch.stack(errors).argmin(0)][:, None, None]
