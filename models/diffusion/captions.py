"""What is said of pictures, by a small grammar: colours before or after the noun, places and background first or last.

So "a red striped circle top left and a bar in blue bottom right on grey" is said as "on grey, bottom right a blue bar
and top left a striped circle in red" too.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from models.diffusion.world import BACKGROUNDS, COLOURS, KINDS, NOTHING, PLACES, SHAPES, TEXTURES, Kind, Scenes

_GRAMMAR = ("top", "bottom", "left", "right", "a", "an", "in", "and", "on", ",")
WORDS = (*SHAPES, *COLOURS, *TEXTURES, *BACKGROUNDS, *_GRAMMAR)
_PLAIN_SAID = 0.3  # the share of plain objects that are called so; of the others nothing is said


def captions(scenes: Scenes, generator: torch.Generator) -> list[str]:
    """One for each scene, in an order of words that the generator decides."""
    chance = Random(int(torch.randint(2**62, (), generator=generator)))
    rows = zip(scenes.kinds.tolist(), scenes.backgrounds.tolist(), strict=True)
    return [_caption(kinds, list(BACKGROUNDS)[background], chance) for kinds, background in rows]


def _caption(kinds: Sequence[int], background: str, chance: Random) -> str:
    place_first, background_first = chance.random() < 0.5, chance.random() < 0.5
    parts = []
    for place, kind in zip(PLACES, kinds, strict=True):
        if kind != NOTHING:
            phrase = _phrase(KINDS[kind - 1], chance)
            parts.append(f"{place} {phrase}" if place_first else f"{phrase} {place}")
    chance.shuffle(parts)
    *first, last = parts
    objects = f"{', '.join(first)} and {last}" if first else last
    return f"on {background}, {objects}" if background_first else f"{objects} on {background}"


def _phrase(kind: Kind, chance: Random) -> str:
    texture = "" if kind.texture == "plain" and chance.random() > _PLAIN_SAID else kind.texture
    orders = [[kind.colour, texture, kind.shape], [texture, kind.shape, "in", kind.colour]]
    said = " ".join(filter(None, chance.choice(orders)))
    return f"{'an' if said[0] in 'aeio' else 'a'} {said}"
