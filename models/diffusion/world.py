"""A world of rendered pictures: one to three objects in four places before a background.

A picture is 32 x 32. Its quarters are the places; an object is 12 x 12 in a quarter of 16 x 16, a pixel or two from its
edges. Each object is of a kind: a shape, a colour and a texture. All quarters that can be are prepared once, and a
picture is four of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SIZE, PLACE, OBJECT = 32, 16, 12  # pixels a side: of a picture, of a place, of an object
PLACES = ("top left", "top right", "bottom left", "bottom right")
NOTHING = 0  # the number of an empty place; that of the first kind of object is 1
_OFFSETS = tuple((top, left) for top in (1, 2, 3) for left in (1, 2, 3))  # of an object in its place
_FOLDS = 10
_FINE = 4  # samples a pixel's side, of which the edge of a shape is the mean

Where = Callable[[Tensor, Tensor], Tensor]

# x to the right and y down, both from -1 to 1 over an object's side.
SHAPES: Mapping[str, Where] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) <= 0.92,
    "triangle": lambda x, y: x.abs() <= (y + 1) / 2,
    "cross": lambda x, y: torch.minimum(x.abs(), y.abs()) <= 0.36,
    "diamond": lambda x, y: x.abs() + y.abs() <= 1,
    "bar": lambda x, y: (y.abs() <= 0.42) & (x.abs() <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
    "corner": lambda x, y: (x <= -0.25) | (y >= 0.25),
    "arrow": lambda x, y: torch.where(x > 0, y.abs() <= 1 - x, y.abs() <= 0.34),
    "sandglass": lambda x, y: x.abs() <= y.abs(),
}
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.05, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.10, 0.25, 1.00),
    "yellow": (0.95, 0.95, 0.15),
    "orange": (1.00, 0.50, 0.00),
    "purple": (0.55, 0.05, 0.80),
    "cyan": (0.10, 0.90, 0.95),
    "pink": (1.00, 0.40, 0.75),
}
# Where an object is dark, by its pixels' rows and columns.
TEXTURES: Mapping[str, Where] = {
    "plain": lambda row, column: torch.zeros_like(row + column, dtype=torch.bool),
    "striped": lambda row, column: (row // 3 + 0 * column) % 2 == 1,
    "checked": lambda row, column: (row // 4 + column // 4) % 2 == 1,
    "halved": lambda row, column: 0 * row + column >= OBJECT // 2,
    "dotted": lambda row, column: (row % 4 % 3 > 0) & (column % 4 % 3 > 0),
}
BACKGROUNDS: Mapping[str, float] = {"black": 0.0, "grey": 0.5, "white": 1.0}
_DARK = 0.3  # of its colour


class Kind(NamedTuple):
    """What an object is, in words."""

    shape: str
    colour: str
    texture: str


KINDS = tuple(Kind(*words) for words in itertools.product(SHAPES, COLOURS, TEXTURES))  # number k is KINDS[k - 1]


def _held_out(kind: Kind) -> bool:
    shape, colour, texture = (
        list(words).index(word) for words, word in zip((SHAPES, COLOURS, TEXTURES), kind, strict=True)
    )
    return colour == (shape + 3 * texture) % len(COLOURS)


@dataclass(frozen=True, eq=False)
class Scenes:
    """What stands in some pictures.

    Attributes:
        kinds: ``(pictures, 4)``, numbers of `KINDS`, one for each place; `NOTHING` where it is empty.
        backgrounds: ``(pictures,)``.
        offsets: ``(pictures, 4)``, which of the nine an object has in its place; of an empty place it means nothing.
    """

    kinds: Tensor
    backgrounds: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, which: slice | Tensor) -> Scenes:
        return Scenes(self.kinds[which], self.backgrounds[which], self.offsets[which])

    @property
    def kept_out(self) -> Tensor:
        """``(pictures,)``, whether what stands there is in no picture for training; one in ten is, by its content."""
        code = self.kinds @ torch.tensor([1, 3, 7, 9]) + 3 * self.backgrounds
        return code % _FOLDS == 0


def joined(parts: Sequence[Scenes]) -> Scenes:
    """The scenes one after another."""
    kinds, backgrounds, offsets = zip(*((part.kinds, part.backgrounds, part.offsets) for part in parts), strict=True)
    return Scenes(torch.cat(kinds), torch.cat(backgrounds), torch.cat(offsets))


class World:
    """Scenes with some shapes and textures, in all colours, places and backgrounds.

    Attributes:
        numbers: of all kinds that there are.
        held_out: of those that no training sees: of each shape with each texture one colour.
        trained: of the others.
    """

    def __init__(self, shapes: Sequence[str], textures: Sequence[str]) -> None:
        here = [number for number, kind in enumerate(KINDS, 1) if kind.shape in shapes and kind.texture in textures]
        self.numbers = torch.tensor(here)
        self.held_out = torch.tensor([number for number in here if _held_out(KINDS[number - 1])])
        self.trained = torch.tensor([number for number in here if not _held_out(KINDS[number - 1])])

    def draw(
        self,
        count: int,
        generator: torch.Generator,
        *,
        objects: Sequence[int] = (1, 2, 3),
        kinds: Tensor | None = None,
        kept_out: bool = False,
    ) -> Scenes:
        """Scenes at random.

        Args:
            count: of them.
            generator: decides all of it.
            objects: how many objects a picture has, each number as often.
            kinds: numbers of the kinds that are drawn; those of training if absent.
            kept_out: scenes that no training sees, or else scenes for training; see `Scenes.kept_out`.
        """
        kinds, parts, missing = self.trained if kinds is None else kinds, [], count
        while missing > 0:
            scenes = _random(max(2 * count, 64), generator, torch.tensor(objects), kinds)
            parts.append(scenes[scenes.kept_out == kept_out])
            missing -= len(parts[-1])
        return joined(parts)[:count]


BASE = World(("circle", "square", "triangle", "cross", "diamond", "bar"), ("plain", "striped", "checked"))
EVERYTHING = World(tuple(SHAPES), tuple(TEXTURES))


def render(scenes: Scenes) -> Tensor:
    """Their pictures: ``(pictures, 3, 32, 32)``, from 0 to 1."""
    places = patches()[scenes.backgrounds[:, None], scenes.kinds, scenes.offsets]  # (pictures, 4, 3, 16, 16)
    rows = places.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # (pictures, 3, 2, 16, 2, 16)
    return rows.reshape(len(scenes), 3, SIZE, SIZE)


def quarters(pictures: Tensor) -> Tensor:
    """The places of pictures: ``(pictures, 3, 32, 32)`` -> ``(pictures, 4, 3, 16, 16)``."""
    rows = pictures.unflatten(3, (2, PLACE)).unflatten(2, (2, PLACE))  # (pictures, 3, 2, 16, 2, 16)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


@cache
def patches() -> Tensor:
    """Every place that can be: ``(backgrounds, 1 + kinds, 9, 3, 16, 16)``, from 0 to 1."""
    grounds = torch.tensor(list(BACKGROUNDS.values())).view(-1, 1, 1, 1, 1, 1)
    places = grounds.expand(-1, 1 + len(KINDS), len(_OFFSETS), 3, PLACE, PLACE).clone()
    masks = torch.stack([_mask(kind.shape) for kind in KINDS])[:, None]  # (kinds, 1, 12, 12)
    inks = torch.stack([_ink(kind) for kind in KINDS])  # (kinds, 3, 12, 12)
    drawn = grounds[:, 0] * (1 - masks) + inks * masks  # (backgrounds, kinds, 3, 12, 12)
    for number, (top, left) in enumerate(_OFFSETS):
        places[:, 1:, number, :, top : top + OBJECT, left : left + OBJECT] = drawn
    return places


@cache
def _mask(shape: str) -> Tensor:
    """How much of each pixel a shape covers: ``(12, 12)``."""
    side = (torch.arange(OBJECT * _FINE) + 0.5) / (OBJECT * _FINE) * 2 - 1
    inside = SHAPES[shape](side[None, :], side[:, None]).expand(len(side), len(side)).float()
    return inside.unflatten(1, (OBJECT, _FINE)).unflatten(0, (OBJECT, _FINE)).mean(dim=(1, 3))


def _ink(kind: Kind) -> Tensor:
    """What an object's pixels would be if its shape were all of them: ``(3, 12, 12)``."""
    side = torch.arange(OBJECT)
    dark = TEXTURES[kind.texture](side[:, None], side[None, :])  # (12, 12)
    return torch.tensor(COLOURS[kind.colour])[:, None, None] * torch.where(dark, _DARK, 1.0)


def _random(count: int, generator: torch.Generator, objects: Tensor, kinds: Tensor) -> Scenes:
    def among(values: Tensor, *shape: int) -> Tensor:
        return values[torch.randint(len(values), shape, generator=generator)]

    order = torch.rand(count, len(PLACES), generator=generator).argsort(dim=1)
    stands = order < among(objects, count)[:, None]
    return Scenes(
        torch.where(stands, among(kinds, count, len(PLACES)), NOTHING),
        among(torch.arange(len(BACKGROUNDS)), count),
        among(torch.arange(len(_OFFSETS)), count, len(PLACES)),
    )
