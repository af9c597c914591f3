"""The router whose size does not depend on how many LoRAs there are."""

import torch
from torch import Tensor, nn

from lamella.kernels import FrozenLoras
from lamella.kernels.chosen import read_own, read_own_of_all
from lamella.tuners.mole.router import GroupRouter


class SharedRouter(GroupRouter):
    """``eps_i = e . E_i + v log |E_i|``: each LoRA's logit reads its own outputs, by weights that are the same for all.

    ``E_i (D,)`` are the outputs of LoRA i in the matrices that the group reads, normalised by themselves, and ``|E_i|``
    is their length before that, which is the LoRA's retrieval key *spectrum* but for what is the same for all. ``e``
    has shape ``(D,)`` and ``length (1,)``: there is no K in them, so that a LoRA may be added after training, or taken
    away. The rest is as in `MoleRouter`.
    """

    def __init__(
        self, num_loras: int, widths: int, temperature: float, learn_temperature: bool, scale: float | None = None
    ) -> None:
        super().__init__(num_loras, temperature, learn_temperature)
        self.scale = scale
        self.e = nn.Parameter(torch.zeros(widths)) if widths else None
        self.length = nn.Parameter(torch.zeros(1))

    def randomise(self) -> None:
        """Moves the router off zero, for tests."""
        if self.e is not None:
            nn.init.normal_(self.e, std=1.0 if self.scale is None else len(self.e) / self.scale)
        nn.init.normal_(self.length)

    def forward(self, h: list[Tensor], loras: list[FrozenLoras], rows: torch.Size, device: torch.device) -> Tensor:
        """Logits, divided by the temperature, as `MoleRouter.forward`."""
        if self.e is None:
            return self._even(rows, self.num_loras, device)
        here = self.e.device
        with torch.autocast(here.type, enabled=False):
            return self._logits(
                *read_own_of_all([one.to(here) for one in h], [one.on(here) for one in loras], self._wide())
            ).to(device)

    def of_chosen(self, h: list[Tensor], B: list[Tensor], rows: torch.Size, count: int, device: torch.device) -> Tensor:
        """The same for LoRAs that each row has chosen for itself.

        Args:
            h: ``A_m x`` for each matrix that is read, ``(*rows, n, r_m)``.
            B: theirs, ``(*rows, n, out_m, r_m)``.
            rows: what decisions there are.
            count: n.
            device: where they are needed.

        Returns:
            ``(*rows, n)`` in float32 or wider.
        """
        if self.e is None:
            return self._even(rows, count, device)
        here = self.e.device
        with torch.autocast(here.type, enabled=False):
            return self._logits(*read_own([one.to(here) for one in h], [one.to(here) for one in B], self._wide())).to(
                device
            )

    def _wide(self) -> Tensor:
        assert self.e is not None
        return self.e.to(torch.promote_types(self.e.dtype, torch.float32))

    def _even(self, rows: torch.Size, count: int, device: torch.device) -> Tensor:
        return (self.length * 0).to(device, torch.float32).expand(*rows, count)

    def _logits(self, products: Tensor, lengths: Tensor) -> Tensor:
        if self.scale is not None:
            assert self.e is not None
            products = products * (self.scale / len(self.e))
        logits, tau = products + self.length.to(lengths) * lengths, self.temperature()
        return logits / (tau.to(logits) if isinstance(tau, Tensor) else tau)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"num_loras={self.num_loras}, reads={0 if self.e is None else len(self.e)}, shared"
