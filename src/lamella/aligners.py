"""Aligners: what stands before an expert so that it can do another expert's work.

Most map a space to itself. A `TwoWayAligner` stands around a block that works in another space than its host.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from lamella.errors import LamellaError

Kind = Literal["linear", "layernorm", "low-rank", "identity", "published"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# An aligner that starts near the identity starts as that multiple of it which errs least on the training tokens. The
# identity itself is right for like experts and much worse than a random start for unlike ones, where it saturates the
# target.
IDENTITY_SCALES = (1.0, 0.5, 0.25, 0.1)
EPSILON = 1e-5  # of the layer norm; torch's and the published value


class Aligner(nn.Module):
    """``A(x)``, ``(..., h) -> (..., h)``; what an expert is given in another expert's place.

    Attributes:
        hidden_size: h.
        bias: ``(h,)``.
    """

    kind: ClassVar[Kind]
    scales: ClassVar[bool] = False  # whether it can start as any multiple of the identity
    hidden_size: int
    bias: Tensor

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        for name, shape in self.shapes(hidden_size, rank).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.fill(dict(self.named_parameters()))

    @classmethod
    def shapes(cls, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by name."""
        return {}

    @classmethod
    def fill(
        cls,
        parameters: Mapping[str, Tensor],
        generator: torch.Generator | None = None,
        inputs: Tensor | None = None,
    ) -> None:
        """Writes the start of training into parameters of these names and shapes.

        Args:
            parameters: of one aligner.
            generator: of what is drawn.
            inputs: what the aligner will be given, ``(n, h)``, for a start that depends on it.
        """

    @classmethod
    def rescale(cls, parameters: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiplies what S stacked aligners put out by ``factors (S,)``, where the kind can."""

    @property
    def matrix(self) -> Tensor:
        """M ``(h, h)`` where ``A(x) = M x + bias``.

        Raises:
            LamellaError: the aligner is not linear.
        """
        raise LamellaError(
            f"A {self.kind} aligner is not linear and cannot be folded into an expert's weights; "
            'train a "linear" or a "low-rank" one.'
        )


class LayerNormAligner(Aligner):
    """``LayerNorm(W x + b)``; it starts near the identity: W = diag(1/σ) and b = −μ/σ, gain σ and shift μ, the mean and
    deviation of each feature of its inputs.
    """

    kind: ClassVar[Kind] = "layernorm"
    scales = True
    weight: Tensor
    gain: Tensor
    shift: Tensor

    @classmethod
    def shapes(cls, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        vector = (hidden_size,)
        return {"weight": (hidden_size, hidden_size), "bias": vector, "gain": vector, "shift": vector}

    @classmethod
    @torch.no_grad()
    def fill(
        cls, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None, inputs: Tensor | None = None
    ) -> None:
        gain, shift = parameters["gain"], parameters["shift"]
        gain.fill_(1.0) if inputs is None else gain.copy_(inputs.std(0, unbiased=False))
        shift.zero_() if inputs is None else shift.copy_(inputs.mean(0))
        slope = gain.clamp_min(EPSILON * gain.max()).reciprocal()  # of a feature that hardly varies, finite
        parameters["weight"].copy_(slope.diag())
        parameters["bias"].copy_(-shift * slope)

    @classmethod
    @torch.no_grad()
    def rescale(cls, parameters: Mapping[str, Tensor], factors: Tensor) -> None:
        parameters["gain"].mul_(factors[:, None])
        parameters["shift"].mul_(factors[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(linear(x, self.weight, self.bias), (self.hidden_size,), self.gain, self.shift, EPSILON)


class PublishedAligner(LayerNormAligner):
    """``LayerNorm(W x + b)`` from the published start, that of ``nn.Linear`` and ``nn.LayerNorm``: W and b uniform
    within 1/sqrt(h), gain 1, shift 0. From there it hardly regains even the expert itself in a few hundred steps.

    Source: Alisetti & Kumar, MoE Align: Quantifying Expert Similarity Across Transformer Layers.
    """

    kind = "published"
    scales = False

    @classmethod
    @torch.no_grad()
    def fill(
        cls, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None, inputs: Tensor | None = None
    ) -> None:
        bound = parameters["bias"].shape[0] ** -0.5
        parameters["weight"].uniform_(-bound, bound, generator=generator)
        parameters["bias"].uniform_(-bound, bound, generator=generator)
        parameters["gain"].fill_(1.0)
        parameters["shift"].zero_()


class LinearAligner(Aligner):
    """``W x + b``; it starts as the identity."""

    kind = "linear"
    scales = True
    weight: Tensor

    @classmethod
    def shapes(cls, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (hidden_size, hidden_size), "bias": (hidden_size,)}

    @classmethod
    @torch.no_grad()
    def fill(
        cls, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None, inputs: Tensor | None = None
    ) -> None:
        parameters["weight"].zero_().fill_diagonal_(1.0)
        parameters["bias"].zero_()

    @classmethod
    @torch.no_grad()
    def rescale(cls, parameters: Mapping[str, Tensor], factors: Tensor) -> None:
        parameters["weight"].mul_(factors[:, None, None])
        parameters["bias"].mul_(factors[:, None])

    @property
    def matrix(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LowRankAligner(Aligner):
    """``x + U V x + b``, U ``(h, r)``, V ``(r, h)``; it starts as the identity: U and b zero, V uniform within
    1/sqrt(h), as a LoRA does.
    """

    kind = "low-rank"
    up: Tensor
    down: Tensor

    @classmethod
    def shapes(cls, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"up": (hidden_size, rank), "down": (rank, hidden_size), "bias": (hidden_size,)}

    @classmethod
    @torch.no_grad()
    def fill(
        cls, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None, inputs: Tensor | None = None
    ) -> None:
        bound = parameters["bias"].shape[0] ** -0.5
        parameters["down"].uniform_(-bound, bound, generator=generator)
        parameters["up"].zero_()
        parameters["bias"].zero_()

    @property
    def matrix(self) -> Tensor:
        return torch.eye(self.hidden_size, device=self.up.device, dtype=self.up.dtype) + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return x + linear(linear(x, self.down), self.up, self.bias)


class IdentityAligner(Aligner):
    """``x``: the expert as it is; nothing is trained."""

    kind = "identity"

    @property
    def matrix(self) -> Tensor:
        return torch.eye(self.hidden_size)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """Zeros ``(h,)``."""
        return torch.zeros(self.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x


_CLASSES: dict[str, type[Aligner]] = {
    one.kind: one for one in (LinearAligner, LayerNormAligner, LowRankAligner, IdentityAligner, PublishedAligner)
}


def aligner_class(kind: str) -> type[Aligner]:
    """The class of a kind of aligner.

    Raises:
        LamellaError: there is no such kind.
    """
    if kind not in _CLASSES:
        raise LamellaError(f"There is no aligner {kind!r}; there are {', '.join(KINDS)}.")
    return _CLASSES[kind]


def aligner_rank(hidden_size: int, rank: int | None = None) -> int:
    """The rank of a low-rank aligner: an eighth of the hidden size unless given.

    Raises:
        LamellaError: it lies outside 1 to the hidden size.
    """
    chosen = max(1, hidden_size // 8) if rank is None else rank
    if not 1 <= chosen <= hidden_size:
        raise LamellaError(f"An aligner of {hidden_size} dimensions cannot have rank {rank}; use 1 to {hidden_size}.")
    return chosen


def aligner_parameters(kind: str, hidden_size: int, rank: int) -> int:
    """How many numbers an aligner stores.

    Raises:
        LamellaError: there is no such kind.
    """
    return sum(math.prod(shape) for shape in aligner_class(kind).shapes(hidden_size, rank).values())


def make_aligner(kind: str, hidden_size: int, rank: int | None = None) -> Aligner:
    """An aligner before training.

    Args:
        kind: "linear", "layernorm", "low-rank", "identity" or "published".
        hidden_size: h, the size of what experts are given.
        rank: of a low-rank one; an eighth of the hidden size unless given.

    Raises:
        LamellaError: there is no such kind, or the rank cannot be.
    """
    return aligner_class(kind)(hidden_size, aligner_rank(hidden_size, rank))


# Of the mean variance of a feature: what a regression adds to the diagonal, so that features that hardly vary and
# those that others say already get small weights.
_RIDGE = 1e-3


class TwoWayAligner(nn.Module):
    """Linear maps between spaces of H and G dimensions: ``there(x) = D x + d``, and ``back(s) = U s`` for differences.

    It starts as the identity where both have one size, otherwise with D of orthonormal rows or columns, d zero and U
    the transpose of D; `fit` finds both by regression.

    Attributes:
        down: D and d, ``(G, H)`` and ``(G,)``.
        up: U ``(H, G)``; without a bias, so that a block that changes nothing over there changes nothing here.
    """

    def __init__(self, here: int, there: int) -> None:
        super().__init__()
        self.down = nn.Linear(here, there)
        self.up = nn.Linear(there, here, bias=False)
        if here == there:
            nn.init.eye_(self.down.weight)
        else:
            nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        with torch.no_grad():
            self.up.weight.copy_(self.down.weight.T)

    def there(self, x: Tensor) -> Tensor:
        """``(..., H) -> (..., G)``."""
        return linear(x, self.down.weight, self.down.bias)

    def back(self, step: Tensor) -> Tensor:
        """``(..., G) -> (..., H)``."""
        return linear(step, self.up.weight)

    @torch.no_grad()
    def fit(self, pairs: "Pairs") -> None:
        """Sets D, d and U to the ridge regressions of pairs: of y on x, and of x on y about their means."""
        slope, shift = pairs.regression(of_there=True)  # (G, H), (G,)
        self.down.weight.copy_(slope)
        self.down.bias.copy_(shift)
        self.up.weight.copy_(pairs.regression(of_there=False)[0])

    def unexplained(self, pairs: "Pairs") -> float:
        """The part of the variance of y that ``there(x)`` leaves unexplained on these pairs."""
        weight, bias = self.down.weight.detach().double().cpu(), self.down.bias.detach().double().cpu()
        error = torch.cat([weight, -torch.eye(len(weight), dtype=torch.float64), bias[:, None]], dim=1)  # of (x, y, 1)
        left = (error @ pairs.moments * error).sum()
        return float(left / pairs.covariance()[pairs.here :, pairs.here :].trace())


class Pairs:
    """What regressions between two spaces need of pairs x ``(H,)`` and y ``(G,)``: sums, and sums of products.

    Attributes:
        here: H.
        moments: sums of ``z z^T`` over the pairs, z being x, y and 1, ``(H + G + 1, H + G + 1)``, in float64.
    """

    def __init__(self, here: int, there: int) -> None:
        self.here = here
        self.moments = torch.zeros(here + there + 1, here + there + 1, dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many pairs."""
        return int(self.moments[-1, -1])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in pairs, ``(N, H)`` and ``(N, G)``."""
        z = torch.cat([x, y, torch.ones(len(x), 1, device=x.device, dtype=x.dtype)], dim=1).double().cpu()
        self.moments += z.T @ z

    def covariance(self) -> Tensor:
        """Sums of products about the means, ``(H + G, H + G)``."""
        sums = self.moments[-1, :-1]
        return self.moments[:-1, :-1] - sums.outer(sums) / self.moments[-1, -1]

    def regression(self, of_there: bool) -> tuple[Tensor, Tensor]:
        """Slope and intercept of the ridge regression of y on x, or of x on y."""
        covariance, means = self.covariance(), self.moments[-1, :-1] / self.moments[-1, -1]
        x, y = slice(None, self.here), slice(self.here, None)
        x, y = (x, y) if of_there else (y, x)
        within = covariance[x, x]
        ridge = _RIDGE * within.trace() / len(within) * torch.eye(len(within), dtype=torch.float64)
        slope = torch.linalg.solve(within + ridge, covariance[x, y]).T
        return slope, means[y] - slope @ means[x]
