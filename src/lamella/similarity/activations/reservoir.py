"""The samples and counts of one layer while text streams by: bounded memory, the same in any order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.similarity.activations.keys import hashed

COUNTS = ("captured", "selected", "dropped", "together", "tokens")
SAMPLES = ("keys", "rows", "positions", "inputs")
_EMPTY = torch.iinfo(torch.int64).max  # the key of a place that no sample has


@dataclass(eq=False)
class Reservoir:
    """The ``per_expert`` (K) tokens with the smallest keys, of each of E experts, and counts of all tokens.

    Attributes:
        keys: ``(E, K)``, in no order; the largest integer where no sample is.
        rows, positions: the document of each sample, and its place among the document's real tokens, ``(E, K)``.
        inputs: ``(E, K, h)``, on the CPU.
        selected, dropped: choices of each expert, and those among them that it had no room for, ``(E,)``.
        together: tokens that chose both of two experts, ``(E, E)``; on the diagonal those that chose the one.
        tokens: real tokens, ``()``.
    """

    keys: Tensor
    rows: Tensor
    positions: Tensor
    inputs: Tensor
    selected: Tensor
    dropped: Tensor
    together: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, experts: int, per_expert: int, hidden: int, dtype: torch.dtype) -> "Reservoir":
        """One without samples."""
        places = (experts, per_expert)
        return cls(
            keys=torch.full(places, _EMPTY),
            rows=torch.zeros(places, dtype=torch.int64),
            positions=torch.zeros(places, dtype=torch.int64),
            inputs=torch.empty(*places, hidden, dtype=dtype),
            selected=torch.zeros(experts, dtype=torch.int64),
            dropped=torch.zeros(experts, dtype=torch.int64),
            together=torch.zeros(experts, experts, dtype=torch.int64),
            tokens=torch.zeros((), dtype=torch.int64),
        )

    @property
    def captured(self) -> Tensor:
        """How many samples each expert has, ``(E,)``."""
        return (self.keys != _EMPTY).sum(dim=1)

    def count(self, indices: Tensor, kept: Tensor | None, skipped: Tensor | None = None) -> None:
        """Counts the choices ``(N, k)`` of real tokens.

        Args:
            indices: of the experts.
            kept: False where an expert had no room.
            skipped: True where none of the experts was chosen.
        """
        experts = len(self.selected)
        chose = torch.ones_like(indices, dtype=torch.bool) if skipped is None else ~skipped
        self.selected += torch.bincount(indices[chose], minlength=experts).cpu()
        if kept is not None:
            self.dropped += torch.bincount(indices[chose & ~kept], minlength=experts).cpu()
        chosen = torch.zeros(len(indices), experts, device=indices.device).scatter_(1, indices, chose.float())  # (N, E)
        self.together += (chosen.T @ chosen).long().cpu()
        self.tokens += len(indices)

    def offer(
        self, seed: int, layer: int, indices: Tensor, taken: Tensor, rows: Tensor, positions: Tensor, x: Tensor
    ) -> None:
        """Offers real tokens ``x (N, h)`` to the experts that took them; those with the smallest keys stay.

        Args:
            seed: of the keys.
            layer: index of the layer.
            indices: who was chosen, ``(N, k)``.
            taken: whether the chosen one had room, ``(N, k)``.
            rows: the document of each token, ``(N,)``.
            positions: its place among the real tokens of its document, ``(N,)``.
            x: the tokens.
        """
        token, choice = torch.where(taken)  # (M,), (M,)
        experts = indices[token, choice]
        keys = hashed(seed, layer, experts, rows[token], positions[token])
        full = self.keys.amax(dim=1).to(keys.device)  # (E,): no larger key can stay
        able = keys < full[experts]
        token = token[able]
        drawn = self._draw(keys[able].cpu(), experts[able].cpu())
        if drawn is not None:
            expert, place, new = drawn
            came = token[new.to(token.device)]
            self.rows[expert, place] = rows[came].cpu()
            self.positions[expert, place] = positions[came].cpu()
            self.inputs[expert, place] = x[came].to(self.inputs)

    def _draw(self, keys: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Takes up the smallest of the keys ``(M,)``; where they went, as expert and place, and which they are."""
        if not len(keys):
            return None
        columns = _columns(experts, len(self.keys))
        size, width = self.keys.shape[1], int(columns.max()) + 1
        offered = torch.full((len(self.keys), width), -1)
        offered[experts, columns] = torch.arange(len(keys))
        both = torch.cat([self.keys, torch.full_like(offered, _EMPTY)], dim=1)  # (E, K + width)
        both[experts, size + columns] = keys
        # stable: of two empty places the one that exists stays
        stays = both.argsort(dim=1, stable=True)[:, :size]
        gone = torch.ones_like(both, dtype=torch.bool).scatter_(1, stays, False)
        # each expert gains as many as it loses, and both lists go expert by expert
        expert, place = torch.where(gone[:, :size])
        new = offered[torch.where(~gone[:, size:])]
        self.keys[expert, place] = keys[new]
        return expert, place, new

    def packed(self) -> dict[str, Tensor]:
        """All of it by name: samples expert after expert, each expert's in the order of their keys ``(n,)``."""
        order = self.keys.argsort(dim=1)
        held = torch.arange(self.keys.shape[1]) < self.captured[:, None]  # (E, K), the first ones after sorting
        expert, at = torch.where(held)
        place = order[expert, at]
        samples = {name: getattr(self, name)[expert, place] for name in SAMPLES}
        return {**samples, **{name: getattr(self, name) for name in COUNTS}}

    def unpack(self, packed: dict[str, Tensor]) -> None:
        """Takes up what ``packed`` wrote, into an empty one."""
        captured = packed["captured"]
        expert = torch.arange(len(captured)).repeat_interleave(captured)
        place = _columns(expert, len(captured))
        for name in SAMPLES:
            getattr(self, name)[expert, place] = packed[name]
        for name in COUNTS[1:]:
            setattr(self, name, packed[name])


def _columns(experts: Tensor, number: int) -> Tensor:
    """How many of the same expert stand before each, ``(M,)``."""
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=number)
    first = counts.cumsum(0) - counts  # (E,)
    columns = torch.empty_like(experts)
    columns[order] = torch.arange(len(experts)) - first[experts[order]]
    return columns
