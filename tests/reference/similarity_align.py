"""Alignment written to be read: one pair at a time, autograd and torch's own modules. Nothing here imports lamella."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


def module(kind: str, hidden_size: int, rank: int) -> nn.Module:
    """An aligner made of torch's modules; its parameters come in the order of lamella's names below."""
    if kind in ("layernorm", "published"):
        return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size))
    if kind == "linear":
        return nn.Linear(hidden_size, hidden_size)
    return LowRank(hidden_size, rank)


NAMES = {
    "layernorm": ("weight", "bias", "gain", "shift"),
    "published": ("weight", "bias", "gain", "shift"),
    "linear": ("weight", "bias"),
    "low-rank": ("down", "up", "bias"),
}


def train(
    aligner: nn.Module,
    target: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    scale: float,
    steps: int,
    lr: float,
    stop: tuple[Tensor, Tensor] | None = None,
    every: int = 10,
    patience: int = 5,
) -> tuple[list[Tensor], int, float]:
    """The published loop; with a stop part the parameters that were best there, the steps to them, the last loss."""
    optimizer = torch.optim.Adam(aligner.parameters(), lr=lr)
    best, best_step, best_value, waited, loss = None, 0, float("inf"), 0, torch.tensor(float("nan"))
    for step in range(steps + 1):
        if stop is not None and (step % every == 0 or step == steps):
            value = scale * nn.functional.mse_loss(target(aligner(stop[0])), stop[1]).item()
            if value < best_value:
                best, best_step, best_value, waited = [p.detach().clone() for p in aligner.parameters()], step, value, 0
            else:
                waited += 1
            if waited == patience:
                break
        if step < steps:
            optimizer.zero_grad()
            loss = scale * nn.functional.mse_loss(target(aligner(x)), y)
            loss.backward()
            optimizer.step()
    if best is None:
        best, best_step = [p.detach() for p in aligner.parameters()], steps
    return best, best_step, loss.item()
