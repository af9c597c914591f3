"""What a router reads of the LoRAs: in rank space where a sum of deltas is composed, as they are where blocks are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lamella.kernels import FrozenLoras, project
from lamella.routing import Projection, pool_mean
from lamella.tuners.mole.router import MoleRouter

if TYPE_CHECKING:
    from lamella.tuners.mole.layer import MoleLinear


class Reader(Protocol):
    """Logits from what the LoRAs put out for some tokens."""

    def by_token(self, x: Tensor) -> "tuple[Tensor, dict[MoleLinear, Projection]]":
        """Each row's, ``(*rows, K)`` for ``x (*rows, in)``; and ``A x`` for the modules that are given the same x."""

    def by_sequence(self, tokens: Tensor, read: Tensor) -> Tensor:
        """Each sequence's, ``(batch, K)``, from ``tokens (batch, tokens, in)`` where ``read (batch, tokens)`` is."""


class RankSpaceReader:
    """Reads the outputs ``B_i A_i x`` of some modules that are given the same x, without computing them."""

    def __init__(self, router: MoleRouter, readers: "Sequence[MoleLinear]", adapter: str) -> None:
        self.router = router
        self.readers = readers
        self.loras: list[FrozenLoras] = [reader.loras(adapter) for reader in readers]

    def by_token(self, x: Tensor) -> "tuple[Tensor, dict[MoleLinear, Projection]]":
        """As promised; ``A x`` of all modules comes from one GEMM and is handed on."""
        if not self.loras:
            return self.router([], [], x.shape[:-1], x.device), {}
        flat = x.reshape(-1, x.shape[-1]).to(self.loras[0].A.dtype)  # (N, in)
        products = project(flat, [one.A.to(x.device) for one in self.loras])
        h = [product.view(*x.shape[:-1], -1) for product in products]  # (*rows, R_m)
        handed = {reader: Projection(x, one) for reader, one in zip(self.readers, h, strict=True)}
        return self.router(h, self.loras, x.shape[:-1], x.device), handed

    def by_sequence(self, tokens: Tensor, read: Tensor) -> Tensor:
        """As promised; the mean of the outputs is the output of the mean, so that one row a sequence is read."""
        wide = _only(tokens, read)
        if self.router.positions is None:
            pooled = pool_mean(wide, read)  # (batch, in)
            h = [pooled @ one.A.to(pooled).t() for one in self.loras]
        else:
            h = [self.router.lay_out(wide @ one.A.to(wide).t(), read) for one in self.loras]
        return self.router(h, self.loras, tokens.shape[:1], tokens.device)


class OutputReader:
    """Reads what a whole block puts out with each of the LoRAs."""

    def __init__(self, router: MoleRouter, outputs: Sequence[Tensor]) -> None:
        self.router = router
        self.outputs = outputs  # K of (batch, tokens, features)

    def by_token(self, x: Tensor) -> "tuple[Tensor, dict[MoleLinear, Projection]]":
        """As promised, of the outputs at x's places."""
        return self.router.from_outputs(torch.stack(list(self.outputs), dim=-2)), {}

    def by_sequence(self, tokens: Tensor, read: Tensor) -> Tensor:
        """As promised."""
        wide = [_only(output, read) for output in self.outputs]
        if self.router.positions is None:
            return self.router.from_outputs(torch.stack([pool_mean(output, read) for output in wide], dim=-2))
        laid = [self.router.lay_out(output, read) for output in wide]  # K of (batch, positions, features)
        return self.router.from_outputs(torch.stack(laid, dim=-2))


def _only(values: Tensor, read: Tensor) -> Tensor:
    """In float32 or wider, zeros where nothing is read: not multiplied, since padding need not be finite."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~read[..., None], 0)
