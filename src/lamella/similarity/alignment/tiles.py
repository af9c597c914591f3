"""An alignment of many pairs as a list of independent tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from typing import Any

from lamella.similarity.activations import Manifest
from lamella.similarity.screening.pairs import Name, Pair

PAIRS = 1024  # of a tile, where one source has not more


@dataclass(frozen=True)
class Tile:
    """All pairs of some sources of one layer, sorted.

    A source is in one tile only, so that what belongs to a source, its controls, is computed once.
    """

    pairs: tuple[Pair, ...]

    @property
    def sources(self) -> list[Name]:
        """Its sources, sorted."""
        return sorted({source for source, _ in self.pairs})

    def __str__(self) -> str:
        first, last = self.sources[0], self.sources[-1]
        return f"experts {first[1]} to {last[1]} of layer {first[0]} as sources, {len(self.pairs)} pairs"


def cut(pairs: Iterable[Pair], most: int = PAIRS) -> list[Tile]:
    """The pairs as tiles of at most so many pairs, or of one source; sorted."""
    tiles = []
    for _, layer in groupby(sorted(set(pairs)), key=lambda pair: pair[0][0]):
        tiles += [Tile(tuple(together)) for together in _fill(layer, most)]
    return tiles


def _fill(layer: Iterable[Pair], most: int) -> Iterator[list[Pair]]:
    tile: list[Pair] = []
    for _, of_source in groupby(layer, key=lambda pair: pair[0]):
        added = list(of_source)
        if tile and len(tile) + len(added) > most:
            yield tile
            tile = []
        tile += added
    yield tile


def tile_key(tile: Tile, captures: Collection[Manifest], settings: Mapping[str, Any], dtype: str) -> str:
    """What a tile's result depends on, hashed: 16 hex digits.

    The manifest of a capture names its model by fingerprint, and its text by the hash of what was taken in.
    """
    stated = [{**asdict(one), "shards": None, "complete": None} for one in captures]
    told = json.dumps([version("lamella"), stated, dict(settings), dtype, tile.pairs], sort_keys=True, default=repr)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
