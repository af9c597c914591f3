"""A whole model with LoRAs composed on it, written to be read: every LoRA's output of every token is computed.

Imports no lamella. Hooks on a plain model's linear modules add ``sum_i G_i s_i B_i A_i x``; the first call of one of a
unit's readers decides the unit's G.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tests.reference.mole import Lora, logits, output
from torch import Tensor, nn


@dataclass
class Unit:
    """Modules that share a decision, those of them that the router reads, and the router."""

    members: Sequence[str]
    readers: Sequence[str]
    e: Tensor | None  # (K, K, widths of the readers)
    bias: Tensor  # (K,)
    tau: float = 1.0
    scale: float | None = None
    score: str = "softmax"


def weights_of_row(
    tokens: Tensor, readers: Sequence[Sequence[Lora]], widths: Sequence[int], unit: Unit, dropped: Sequence[int] = ()
) -> Tensor:
    """G of one sequence from the tokens ``(T, in)`` that its decision reads: mean output of each LoRA, then softmax,
    or a gate for each from 0 to 2.
    """
    if unit.e is None:
        scores = unit.bias
    else:
        # The mean of the outputs is the output of the mean: LoRAs are linear.
        mean = tokens.mean(dim=0)
        for loras, width in zip(readers, widths, strict=True):
            for lora in loras:
                each = torch.stack([output(lora, token, width) for token in tokens]).mean(dim=0)
                torch.testing.assert_close(each, output(lora, mean, width))
        scores = logits(mean, readers, widths, unit.e, unit.bias, unit.scale)
    grown = [float("-inf") if i in dropped else float(s) / unit.tau for i, s in enumerate(scores)]
    if unit.score == "sigmoid":
        return torch.tensor([2 / (1 + math.exp(-value)) for value in grown], dtype=tokens.dtype)
    return torch.softmax(torch.tensor(grown, dtype=tokens.dtype), dim=0)


@contextmanager
def composed(
    model: nn.Module,
    loras: Mapping[str, Sequence[Lora]],
    units: Sequence[Unit],
    read: Tensor,
    by_token: bool = False,
    without: Tensor | None = None,
    dropped: Sequence[int] = (),
) -> Iterator[dict[str, Tensor]]:
    """Composes the LoRAs on a model for the forwards inside the context.

    Args:
        model: a plain model, in float64.
        loras: the K LoRAs of each adapted module.
        units: what decides.
        read: which tokens a decision for a sequence reads, ``(batch, tokens)``.
        by_token: whether each token decides for itself.
        without: tokens that run with uniform weights, ``(batch, tokens)``.
        dropped: LoRAs that are left out.

    Yields:
        Each unit's weights by its first member, once it has decided.
    """
    unit_of = {name: unit for unit in units for name in unit.members}
    decided: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def decide(unit: Unit, x: Tensor) -> Tensor:
        readers = [loras[name] for name in unit.readers]
        widths = [_width(loras[name]) for name in unit.readers]
        rows = []
        for row, real in zip(x, read, strict=True):
            if by_token:
                rows.append(torch.stack([weights_of_row(t[None], readers, widths, unit, dropped) for t in row]))
            else:
                rows.append(weights_of_row(row[real], readers, widths, unit, dropped))
        return torch.stack(rows)

    def add(name: str):
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x, unit = args[0], unit_of[name]
            if name == unit.members[0] or unit.members[0] not in decided:
                decided[unit.members[0]] = decide(unit, x)
            weights = decided[unit.members[0]]
            count = weights.shape[-1]
            result = y.clone()
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    own = weights[b, t] if by_token else weights[b]
                    if without is not None and without[b, t]:
                        left = [0.0 if i in dropped else 1.0 for i in range(count)]
                        own = torch.tensor(left, dtype=x.dtype) / sum(left)
                    for i in range(count):
                        result[b, t] += own[i] * output(loras[name][i], x[b, t], y.shape[-1])
            return result

        return hook

    hooks = [modules[name].register_forward_hook(add(name)) for name in unit_of]
    try:
        yield decided
    finally:
        for hook in hooks:
            hook.remove()


def _width(loras: Sequence[Lora]) -> int:
    return next(len(lora[1]) for lora in loras if lora is not None)
