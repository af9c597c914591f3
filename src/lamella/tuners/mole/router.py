"""A group's router, and what it reads: from what the LoRAs put out to their logits.

Where a sum of deltas is composed, the outputs are read in rank space; where blocks are, as they are.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamella.backbones.offloading import onloaded
from lamella.errors import LamellaError
from lamella.kernels import FrozenLoras, project, read_outputs, read_positions
from lamella.routing import Sequences, pool_mean

# Below it the softmax is a hard choice, and a learned temperature gets no more gradient.
LOWEST_TEMPERATURE = 0.01


class GroupRouter(nn.Module):
    """From what the LoRAs of a group put out to their logits.

    Attributes:
        num_loras: K.
        positions: of a sequence that are read, L; None where their mean is.
        log_temperature: learned as the factor to the initial temperature, ``(1,)``; None where it is not.
    """

    positions: int | None = None

    def __init__(self, num_loras: int, temperature: float, learn_temperature: bool) -> None:
        super().__init__()
        self.num_loras = num_loras
        self.initial_temperature = temperature
        self.log_temperature = nn.Parameter(torch.zeros(1)) if learn_temperature else None

    def temperature(self) -> Tensor | float:
        """tau, exactly what the config says until it is trained."""
        if self.log_temperature is None:
            return self.initial_temperature
        return (self.initial_temperature * self.log_temperature.exp()).clamp_min(LOWEST_TEMPERATURE)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}log_temperature")
        if saved is not None and saved.dim() == 0:  # as it was once; no kind of FSDP takes a tensor without dimensions
            state_dict[f"{prefix}log_temperature"] = saved[None]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, h: list[Tensor], loras: list[FrozenLoras], rows: torch.Size, device: torch.device) -> Tensor:
        """Logits, divided by the temperature.

        Args:
            h: ``A x`` for each matrix that is read, ``(*rows, R_m)``, or ``(*rows, positions, R_m)``.
            loras: of those matrices.
            rows: what decisions there are.
            device: where they are needed.

        Returns:
            ``(*rows, K)`` in float32 or wider.
        """
        raise NotImplementedError

    def lay_out(self, values: Tensor, real: Tensor, sequences: Sequences) -> Tensor:
        """Puts each sequence's real tokens at its first positions, zeros after them.

        Args:
            values: ``(batch, tokens, F)``.
            real: ``(batch, tokens)``.
            sequences: S of them, in these rows.

        Returns:
            ``(S, positions, F)``.

        Raises:
            LamellaError: a sequence is longer.
        """
        assert self.positions is not None
        longest = int(sequences.total(real.long()).max()) if real.numel() else 0
        if longest > self.positions:
            raise LamellaError(
                f"A sequence of {longest} tokens is longer than flatten_length={self.positions}, which the routers were"
                " made for. Truncate it, compose with a larger flatten_length, or use router_input='mean'."
            )
        number = torch.arange(sequences.count, device=real.device)  # (S,)
        place = (sequences.running(real.long()) - 1).masked_fill(~real, self.positions)  # padding is cut off again
        place = place + sequences.spread(number) * (self.positions + 1)  # (batch, tokens)
        laid = values.new_zeros(sequences.count * (self.positions + 1), values.shape[-1])
        laid = laid.index_copy(0, place.flatten(), values.flatten(0, 1))
        return laid.view(sequences.count, self.positions + 1, -1)[:, : self.positions]


class MoleRouter(GroupRouter):
    """``G = softmax(eps / tau)`` with ``eps = e . E + b`` (MOLE eq. 10-11), E the LoRAs' outputs, normalised together.

    ``e`` has shape ``(K, K, D)``: for each logit and LoRA, what it takes from that LoRA's outputs in the matrices that
    the group reads, D features in all; ``(K, L, K, D)`` where L positions are read. There is none where the group reads
    nothing, so that ``bias (K,)`` alone decides. ``log_temperature (1,)`` is learned as the factor to the initial one.

    With a ``scale`` it is ``eps = scale (e . E) / n + b``, n numbers being in E. A step of Adam moves every e by the
    learning rate, and so ``e . E`` by n times as much; the mean moves alike in models of every width.
    """

    def __init__(
        self,
        num_loras: int,
        widths: int,
        temperature: float,
        learn_temperature: bool,
        positions: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(num_loras, temperature, learn_temperature)
        self.positions = positions
        self.scale = scale
        shape = (num_loras, num_loras, widths) if positions is None else (num_loras, positions, num_loras, widths)
        self.e = nn.Parameter(torch.zeros(shape)) if widths else None
        self.bias = nn.Parameter(torch.zeros(num_loras))

    def randomise(self) -> None:
        """Moves the router off zero, for tests."""
        if self.e is not None:
            nn.init.normal_(self.e, std=1.0 if self.scale is None else self._numbers() / self.scale)
        nn.init.normal_(self.bias)

    def forward(self, h: list[Tensor], loras: list[FrozenLoras], rows: torch.Size, device: torch.device) -> Tensor:
        if self.e is None:
            bias = self.bias.to(torch.promote_types(self.bias.dtype, torch.float32))
            products = torch.zeros_like(bias).expand(*rows, -1)
        else:
            read = read_outputs if self.positions is None else read_positions
            here = self.e.device
            products = read([one.to(here) for one in h], [one.on(here) for one in loras], self.e)
        return self._logits(products).to(device)

    def from_outputs(self, outputs: Tensor) -> Tensor:
        """The same from the LoRAs' outputs themselves, ``(*rows, K, D)`` or ``(*rows, positions, K, D)``."""
        with onloaded(self):
            return self._from_outputs(outputs)

    def _from_outputs(self, outputs: Tensor) -> Tensor:
        assert self.e is not None  # a block puts something out
        e = self.e.to(outputs.device, torch.promote_types(outputs.dtype, torch.float32))
        read = outputs.to(e.dtype).flatten(-(e.dim() - 1))  # (*rows, D in all)
        normalised = nn.functional.layer_norm(read, read.shape[-1:], eps=1e-12)
        return self._logits(normalised @ e.flatten(1).t())

    def _logits(self, products: Tensor) -> Tensor:
        """From ``e . E (*rows, K)``: with the bias, scaled, divided by the temperature."""
        bias, tau = self.bias.to(products), self.temperature()
        if self.scale is not None:
            products = products * (self.scale / self._numbers())
        return (products + bias) / (tau.to(products) if isinstance(tau, Tensor) else tau)

    def _numbers(self) -> int:
        """How many are read for a decision, n."""
        return 1 if self.e is None else self.e[0].numel()

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        reads = 0 if self.e is None else self.e.shape[-1]
        return f"num_loras={self.num_loras}, reads={reads}, positions={self.positions}"


class RouterInputs(Protocol):
    """What a router reads of the LoRAs: logits from what they put out for some tokens."""

    def by_token(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Each row's logits, ``(*rows, K)`` for ``x (*rows, in)``; and ``A x`` of each matrix that is read."""

    def by_sequence(self, tokens: Tensor, read: Tensor, sequences: Sequences) -> Tensor:
        """Each sequence's, ``(S, K)``, from ``tokens (batch, tokens, in)`` where ``read (batch, tokens)`` is."""


class RankSpaceInputs:
    """The outputs ``B_i A_i x`` of some matrices that are given the same x, read without computing them."""

    def __init__(self, router: GroupRouter, loras: list[FrozenLoras]) -> None:
        self.router = router
        self.loras = loras

    def by_token(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``A x`` of all matrices comes from one GEMM."""
        if not self.loras:
            return self.router([], [], x.shape[:-1], x.device), []
        flat = x.reshape(-1, x.shape[-1]).to(self.loras[0].A.dtype)  # (N, in)
        products = project(flat, [one.A.to(x.device) for one in self.loras])
        h = [product.view(*x.shape[:-1], -1) for product in products]  # (*rows, R_m)
        return self.router(h, self.loras, x.shape[:-1], x.device), h

    def by_sequence(self, tokens: Tensor, read: Tensor, sequences: Sequences) -> Tensor:
        """The mean of the outputs is the output of the mean, so that one row a sequence is read."""
        wide = _only(tokens, read)
        if self.router.positions is None:
            pooled = pool_mean(wide, read, sequences)  # (S, in)
            h = [pooled @ one.A.to(pooled).t() for one in self.loras]
        else:
            h = [self.router.lay_out(wide @ one.A.to(wide).t(), read, sequences) for one in self.loras]
        return self.router(h, self.loras, torch.Size([sequences.count]), tokens.device)


class BlockOutputs:
    """What a whole block puts out with each of the LoRAs."""

    def __init__(self, router: GroupRouter, outputs: Sequence[Tensor]) -> None:
        assert isinstance(router, MoleRouter)  # no config has another for whole blocks
        self.router = router
        self.outputs = outputs  # K of (batch, tokens, features)

    def by_token(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of the outputs at the places of x; no matrix is read."""
        return self.router.from_outputs(torch.stack(list(self.outputs), dim=-2)), []

    def by_sequence(self, tokens: Tensor, read: Tensor, sequences: Sequences) -> Tensor:
        """From the mean of each output over a sequence, or from all its positions."""
        wide = [_only(output, read) for output in self.outputs]
        if self.router.positions is None:
            pooled = [pool_mean(output, read, sequences) for output in wide]  # K of (S, features)
            return self.router.from_outputs(torch.stack(pooled, dim=-2))
        laid = [self.router.lay_out(output, read, sequences) for output in wide]  # K of (S, positions, features)
        return self.router.from_outputs(torch.stack(laid, dim=-2))


def _only(values: Tensor, read: Tensor) -> Tensor:
    """In float32 or wider, zeros where nothing is read: not multiplied, since padding need not be finite."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~read[..., None], 0)
