"""One expert of a mixture: its matrices, and the function they make."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import linear

from lamella.errors import LamellaError

OFFLOADED = (
    "which brings them in anew for each forward, so that what is written to them is lost; load the model without "
    "offloading (device_map), or replace experts instead."
)
Activation = Callable[[Tensor | None, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Expert:
    """``x (N, in) -> down(activation(gate x, up x)) (N, out)``, by matrices that may be views of a model's parameters.

    Attributes:
        up: ``(ff, in)``.
        down: ``(out, ff)``.
        activation: from what the gate put out (None where there is no gate) and what ``up`` put out, both ``(N, ff)``,
            to the hidden units ``(N, ff)``.
        gate: ``(ff, in)``; None where the expert has none.
        gate_bias, up_bias: ``(ff,)``; None where there are none.
        down_bias: ``(out,)``; None where there is none.
    """

    up: Tensor
    down: Tensor
    activation: Activation
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden units ``(N, ff)`` for tokens ``x (N, in)``."""
        gate = None if self.gate is None else linear(x, self.gate, self.gate_bias)  # (N, ff)
        return self.activation(gate, linear(x, self.up, self.up_bias))  # (N, ff)

    def __call__(self, x: Tensor) -> Tensor:
        """The expert's output ``(N, out)`` for tokens ``x (N, in)``."""
        return linear(self.hidden(x), self.down, self.down_bias)  # (N, out)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """What the expert has of up, down, gate and biases, by name."""
        named = {name: getattr(self, name) for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")}
        return {name: matrix for name, matrix in named.items() if matrix is not None}

    def copied(self) -> "Expert":
        """The same by copies of its matrices, which cannot be written to."""
        copies: dict[str, Any] = {name: matrix.detach().clone() for name, matrix in self.matrices.items()}
        return CopiedExpert(**vars(self) | copies) if type(self) is Expert else replace(self, **copies)

    @property
    def parameters(self) -> int:
        """How many numbers the matrices hold."""
        return sum(matrix.numel() for matrix in self.matrices.values())

    @torch.no_grad()
    def write(self, other: "Expert") -> None:
        """Copies another expert's matrices into this one's, in place.

        Raises:
            LamellaError: the other has other matrices, or matrices of other shapes.
        """
        mine, theirs = self.matrices, other.matrices
        held, given = ({name: tuple(one.shape) for name, one in of.items()} for of in (mine, theirs))
        if held != given:
            raise LamellaError(f"An expert with the matrices {given} cannot be written over one with {held}.")
        for name, matrix in mine.items():
            matrix.copy_(theirs[name])


@dataclass(frozen=True, eq=False)
class CopiedExpert(Expert):
    """An expert by matrices that are not where the model holds its weights, so that writing to them would be lost.

    Attributes:
        why: a sentence.
    """

    why: str = f"The weights of this expert are offloaded by accelerate, {OFFLOADED}"

    def write(self, other: Expert) -> None:
        """Refuses.

        Raises:
            LamellaError: the model's own weights are not in reach.
        """
        raise LamellaError(self.why)


@dataclass(frozen=True, eq=False, kw_only=True)
class NormedExpert(Expert):
    """An expert whose output is normalised before it is weighted: more than its matrices.

    Attributes:
        norm: ``(N, out) -> (N, out)``, one for all experts of the layer.
    """

    norm: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The expert's output ``(N, out)`` for tokens ``x (N, in)``."""
        return self.norm(super().__call__(x))


@runtime_checkable
class HoldsExperts(Protocol):
    """A module in the place of a family's own experts that knows how to give them out."""

    def expert(self, index: int) -> Expert:
        """What does the work of one of the E experts."""


@dataclass(frozen=True)
class Gated:
    """``activation(gate) * up``, the gated linear unit that most families use."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The hidden units ``(N, ff)``."""
        assert gate is not None
        return self.activation(gate) * up


def ungated(activation: Callable[[Tensor], Tensor]) -> Activation:
    """``activation(up)``."""
    return lambda _, up: activation(up)
