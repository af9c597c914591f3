"""A judge of pictures: what stands in each place and before what, found by comparing with everything that can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.diffusion.world import BACKGROUNDS, BASE, KINDS, NOTHING, PLACES, Kind, Scenes, World, patches, quarters

UNCLEAR = -1  # the kind of a place that is like nothing in the world
_AT_ONCE = 128  # pictures


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the judge says of some pictures.

    Attributes:
        kinds: ``(pictures, 4)``, numbers of `KINDS`, `NOTHING` or `UNCLEAR`.
        backgrounds: ``(pictures,)``.
        errors: ``(pictures, 4)``, root mean square distance of each place from what it was taken for.
    """

    kinds: Tensor
    backgrounds: Tensor
    errors: Tensor

    def places_right(self, scenes: Scenes) -> Tensor:
        """``(pictures, 4)``, whether that stands there which should, or nothing where nothing should."""
        return self.kinds == scenes.kinds

    def right(self, scenes: Scenes) -> Tensor:
        """``(pictures,)``, whether all is right: every object, nothing else, and the background."""
        return self.places_right(scenes).all(dim=1) & (self.backgrounds == scenes.backgrounds)


class Judge:
    """It takes a place for what is nearest to it, or for unclear where nothing is near.

    Args:
        world: what it knows.
        unclear_above: root mean square distance, of colours from 0 to 1, above which nothing is near.
    """

    def __init__(self, world: World = BASE, unclear_above: float = 0.12) -> None:
        self._unclear_above = unclear_above
        rows = torch.cat([torch.tensor([NOTHING]), world.numbers])
        known = patches()[:, rows].flatten(3)  # (backgrounds, 1 + kinds, 9, 768)
        self._numbers = rows.repeat_interleave(known.shape[2])
        self._known = known.flatten(1, 2)  # (backgrounds, (1 + kinds) * 9, 768)
        self._norms = self._known.square().sum(dim=2)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Verdict:
        """Look at pictures ``(pictures, 3, 32, 32)``, from 0 to 1."""
        parts = [self._look(part) for part in pictures.float().split(_AT_ONCE)]
        return Verdict(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _look(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = quarters(pictures).flatten(2).flatten(0, 1)  # (pictures * 4, 768)
        norms = seen.square().sum(dim=1)
        nearest = [
            (norms[:, None] + squares - 2 * seen @ known.T).min(dim=1)
            for known, squares in zip(self._known, self._norms, strict=True)
        ]
        distances = torch.stack([values for values, _ in nearest]).unflatten(1, (-1, len(PLACES)))
        rows = torch.stack([which for _, which in nearest]).unflatten(1, (-1, len(PLACES)))
        backgrounds = distances.sum(dim=2).argmin(dim=0)  # (pictures,)
        each = torch.arange(len(pictures))
        errors = (distances[backgrounds, each].clamp(min=0) / seen.shape[1]).sqrt()  # (pictures, 4)
        kinds = torch.where(errors > self._unclear_above, UNCLEAR, self._numbers[rows[backgrounds, each]])
        return kinds, backgrounds, errors


def described(verdict: Verdict, picture: int) -> tuple[str, dict[str, Kind | None]]:
    """Of one picture the background, and what stands in each place that is not empty; None is unclear."""
    found = {
        place: None if number == UNCLEAR else KINDS[number - 1]
        for place, number in zip(PLACES, verdict.kinds[picture].tolist(), strict=True)
        if number != NOTHING
    }
    return list(BACKGROUNDS)[int(verdict.backgrounds[picture])], found
