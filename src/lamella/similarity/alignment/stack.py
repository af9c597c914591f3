"""Many aligners at once: their parameters stacked, and their gradients written by hand.

Written by hand because autograd's way costs half as much time again: it saves and allocates what is not needed.
Every stack maps ``x (S, n, h)`` to ``(S, n, h)``, aligner s seeing rows s; ``backward`` takes the gradient there, which
it may overwrite, and leaves gradients at the parameters. Nothing flows to x.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lamella.aligners import EPSILON, Aligner, aligner_class
from lamella.similarity.alignment.frozen import Buffers


class Stack:
    """The aligners of one kind of S pairs.

    Attributes:
        flat: all parameters of all pairs one after the other.
        flat_gradient: their gradients in the same order.
        parameters: by name, each ``(S, ...)``, views of ``flat``.
        gradients: likewise, views of ``flat_gradient``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> None:
        self.flat = like.new_empty(sum(math.prod(shape) for shape in shapes.values()))
        self.flat_gradient = torch.empty_like(self.flat)
        self.parameters, self.gradients = _views(self.flat, shapes), _views(self.flat_gradient, shapes)
        self._buffers = Buffers()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the aligners make of ``x (S, n, h)``; it is kept for ``backward``."""
        raise NotImplementedError

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> None:
        """Leaves the parameters' gradients, from the gradient ``(S, n, h)`` at what ``forward`` gave."""
        raise NotImplementedError


class LayerNormStack(Stack):
    """``LayerNorm(W x + b)``. The mean over outputs is taken off the rows of W and b, which is less work than taking it
    off their products with n tokens, and off the gradients likewise.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _centred(self.parameters["weight"]), _centred(self.parameters["bias"])
        z = torch.baddbmm(bias[:, None], x, weight.mT, out=self._buffers.take("z", x, *x.shape))
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)  # (S, n, 1)
        self._x, self._inverse = x, norm.square_().div_(z.shape[-1]).add_(EPSILON).rsqrt_()
        self._normed = z.mul_(self._inverse)
        aligned = self._buffers.take("aligned", x, *x.shape)
        return torch.addcmul(
            self.parameters["shift"][:, None], self._normed, self.parameters["gain"][:, None], out=aligned
        )

    def backward(self, gradient: Tensor) -> None:
        parameters, gradients = self.parameters, self.gradients
        # the aligned tokens have been used by now
        product = torch.mul(gradient, self._normed, out=self._buffers.take("aligned", gradient, *gradient.shape))
        torch.sum(product, 1, out=gradients["gain"])
        torch.sum(gradient, 1, out=gradients["shift"])
        along = product.mul_(parameters["gain"][:, None]).sum(-1, keepdim=True)  # (S, n, 1)
        gradient.mul_(parameters["gain"][:, None]).addcmul_(self._normed, along, value=-1.0 / gradient.shape[-1])
        gradient.mul_(self._inverse)
        weight, bias = gradients["weight"], gradients["bias"]
        _centred(torch.bmm(gradient.mT, self._x, out=weight), out=weight)
        _centred(torch.sum(gradient, 1, out=bias), out=bias)


class LinearStack(Stack):
    """``W x + b``."""

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        return torch.baddbmm(self.parameters["bias"][:, None], x, self.parameters["weight"].mT)

    def backward(self, gradient: Tensor) -> None:
        torch.bmm(gradient.mT, self._x, out=self.gradients["weight"])
        torch.sum(gradient, 1, out=self.gradients["bias"])


class LowRankStack(Stack):
    """``x + U V x + b``."""

    def forward(self, x: Tensor) -> Tensor:
        self._x, self._inner = x, torch.bmm(x, self.parameters["down"].mT)  # (S, n, r)
        return torch.baddbmm(x + self.parameters["bias"][:, None], self._inner, self.parameters["up"].mT)

    def backward(self, gradient: Tensor) -> None:
        torch.bmm(gradient.mT, self._inner, out=self.gradients["up"])
        torch.bmm(torch.bmm(gradient, self.parameters["up"]).mT, self._x, out=self.gradients["down"])
        torch.sum(gradient, 1, out=self.gradients["bias"])


class IdentityStack(Stack):
    """``x``."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def backward(self, gradient: Tensor) -> None:
        """There is nothing to train."""


_STACKS: dict[str, type[Stack]] = {
    "linear": LinearStack,
    "layernorm": LayerNormStack,
    "published": LayerNormStack,
    "low-rank": LowRankStack,
    "identity": IdentityStack,
}


def start_stack(
    kind: str, hidden_size: int, rank: int, generators: Sequence[torch.Generator], inputs: Sequence[Tensor]
) -> Stack:
    """A stack before training, each pair's aligner drawn by its own generator.

    Args:
        kind: of the aligners.
        hidden_size: h.
        rank: of low-rank ones.
        generators: one per pair, on the device of the inputs.
        inputs: tokens that each pair is trained on, ``(n, h)``; they give device and dtype too.

    Raises:
        LamellaError: there is no such kind.
    """
    aligner = aligner_class(kind)
    shapes = aligner.shapes(hidden_size, rank)
    stack = _STACKS[kind]({name: (len(generators), *shape) for name, shape in shapes.items()}, inputs[0])
    for at, (generator, x) in enumerate(zip(generators, inputs, strict=True)):
        aligner.fill({name: stacked[at] for name, stacked in stack.parameters.items()}, generator, x)
    return stack


def unstack(kind: str, parameters: Mapping[str, Tensor], at: int, hidden_size: int, rank: int) -> Aligner:
    """One aligner of a stack, as a module of its own on the CPU."""
    aligner = aligner_class(kind)(hidden_size, rank)
    aligner.load_state_dict({name: stacked[at].detach().cpu() for name, stacked in parameters.items()})
    return aligner


def _views(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parts of a flat tensor, by name, each in its shape."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _centred(stacked: Tensor, out: Tensor | None = None) -> Tensor:
    """Less its mean over outputs: ``(S, h, ...)``."""
    return torch.sub(stacked, stacked.sum(1, keepdim=True), alpha=1.0 / stacked.shape[1], out=out)
