"""The published flow of comparing experts: the model run anew for every pair, one aligner trained after the other.

Written anew as the yardstick for `lamella.similarity`: what each of the two experts is given and puts out is appended,
token by token, to Python lists until both have enough; then a linear map with a LayerNorm is trained by full-batch
Adam.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lamella.backbones.moe import Dispatch, Expert, moe_layers, watch_dispatch

LR = 1e-3

Name = tuple[int, int]  # layer, expert


class Aligner(nn.Module):
    """``LayerNorm(W x + b)``."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        weight = parameters["weight"]
        self.linear, self.norm = nn.Linear(*weight.shape), nn.LayerNorm(len(weight))
        self.to(weight)
        with torch.no_grad():
            for parameter, given in (
                (self.linear.weight, weight),
                (self.linear.bias, parameters["bias"]),
                (self.norm.weight, parameters["gain"]),
                (self.norm.bias, parameters["shift"]),
            ):
                parameter.copy_(given)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, h) -> (n, h)``."""
        return self.norm(self.linear(x))


def capture_pair(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], names: tuple[Name, Name], samples: int
) -> tuple[Tensor, Tensor]:
    """Inputs and outputs ``(n, h)`` of the first expert, from a run of the model until both have ``samples``."""
    layers = {layer.index: layer for layer in moe_layers(model)}
    rows: dict[Name, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def watch(dispatch: Dispatch) -> None:
        for name in names:
            if name[0] != dispatch.layer.index:
                continue
            x = dispatch.x[(dispatch.routing.indices == name[1]).any(dim=1) & dispatch.real]  # (tokens, h)
            y = layers[name[0]].experts[name[1]](x)  # (tokens, h)
            rows[name] += list(zip(x, y, strict=True))

    with torch.no_grad(), watch_dispatch(model, [layers[index] for index in {name[0] for name in names}], watch):
        for batch in batches:
            model(**batch)
            if all(len(tokens) >= samples for tokens in rows.values()):
                break
    given, put_out = zip(*rows[names[0]][:samples], strict=True)
    return torch.stack(given), torch.stack(put_out)


def train_pair(target: Expert, x: Tensor, y: Tensor, start: Mapping[str, Tensor], steps: int, frozen: bool) -> Tensor:
    """The loss of the last step, before its update, after training one aligner.

    Args:
        target: the expert behind the aligner.
        x: what the source was given, ``(n, h)``.
        y: what it put out, ``(n, h)``.
        start: the aligner before training.
        steps: of Adam.
        frozen: whether the target's weights get no gradient; in the published code they do, unused.
    """
    matrices = {name: one.detach().requires_grad_(not frozen) for name, one in target.matrices.items()}
    expert = Expert(activation=target.activation, **matrices)
    aligner = Aligner(start)
    optimizer = torch.optim.Adam(aligner.parameters(), lr=LR)
    loss = x.new_zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mse_loss(expert(aligner(x)), y)
        loss.backward()
        optimizer.step()
    return loss.detach()
