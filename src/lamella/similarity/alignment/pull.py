"""An optional pull of A(x) towards what the target is used to being given, which the authors planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamella.errors import LamellaError

_VARIANCE_FLOOR = 1e-8  # under which a feature's variance is not believed


@dataclass(frozen=True)
class Pull:
    """A loss on A(x), added with a weight to the normalised error.

    Attributes:
        kind: "mmd": squared maximum mean discrepancy with the kernel exp(-d² / 2σ²), biased estimate. "kl": divergence
            of the Gaussian of A(x) from the Gaussian of the target's inputs, both diagonal, mean over features.
        weight: λ.
        sigma: σ of the kernel; 1 as published, None for the median distance between inputs of the target.

    Raises:
        LamellaError: there is no such kind, or a number is not positive.

    Sources: Gretton et al., A Kernel Two-Sample Test, 2012 (mmd, median heuristic).
    """

    kind: Literal["mmd", "kl"]
    weight: float = 1.0
    sigma: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("mmd", "kl"):
            raise LamellaError(f'There is no pull {self.kind!r}; there are "mmd" and "kl".')
        if not self.weight > 0 or (self.sigma is not None and not self.sigma > 0):
            raise LamellaError(f"A pull needs a positive weight and sigma, not {self.weight} and {self.sigma}.")

    def towards(self, inputs: Tensor) -> TargetPull:
        """The pull towards these inputs of a target, ``(m, h)``."""
        return _Discrepancy(self, inputs) if self.kind == "mmd" else _Divergence(self, inputs)


class TargetPull:
    """A pull towards the inputs of one target."""

    def value(self, aligned: Tensor, weight: Tensor) -> Tensor:
        """The loss of each pair, ``(S,)``, weight λ included.

        Args:
            aligned: A(x), ``(S, n, h)``.
            weight: of the tokens, ``(S, n, 1)``, summing to 1 for each pair; 0 for padding.
        """
        raise NotImplementedError

    def gradient(self, aligned: Tensor, weight: Tensor) -> Tensor:
        """The gradient of `value` at ``aligned``, ``(S, n, h)``."""
        with torch.enable_grad():
            leaf = aligned.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(leaf, weight).sum(), (leaf,))
        return gradient


class _Discrepancy(TargetPull):
    def __init__(self, pull: Pull, inputs: Tensor) -> None:
        self._weight, self._inputs = pull.weight, inputs
        distances = _squared_distances(inputs, inputs)
        self._sigma = pull.sigma or float(distances[distances > 0].median().sqrt())
        self._among = self._kernel(distances).mean()

    def value(self, aligned: Tensor, weight: Tensor) -> Tensor:
        within = (weight * self._kernel(_squared_distances(aligned, aligned)) * weight.mT).sum((1, 2))
        across = (weight * self._kernel(_squared_distances(aligned, self._inputs))).sum((1, 2)) / len(self._inputs)
        return self._weight * (within + self._among - 2.0 * across)

    def _kernel(self, squared_distances: Tensor) -> Tensor:
        return (squared_distances / (-2.0 * self._sigma**2)).exp()


class _Divergence(TargetPull):
    def __init__(self, pull: Pull, inputs: Tensor) -> None:
        self._weight, self._mean = pull.weight, inputs.mean(0)  # (h,)
        self._variance = inputs.var(0, unbiased=False) + _VARIANCE_FLOOR  # (h,)

    def value(self, aligned: Tensor, weight: Tensor) -> Tensor:
        mean = (weight * aligned).sum(1, keepdim=True)  # (S, 1, h)
        variance = (weight * (aligned - mean).square()).sum(1) + _VARIANCE_FLOOR  # (S, h)
        ratio = variance / self._variance
        away = (mean[:, 0] - self._mean).square() / self._variance
        return self._weight * 0.5 * (ratio + away - 1.0 - ratio.log()).mean(-1)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """``(..., n, h)`` and ``(..., m, h)`` to ``(..., n, m)``."""
    squares = first.square().sum(-1)[..., :, None] + second.square().sum(-1)[..., None, :]
    return (squares - 2.0 * first @ second.mT).clamp_min(0.0)
