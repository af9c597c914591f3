"""An alignment of many pairs as a list of independent tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamella.backbones.loading import load_pretrained
from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.activations import Capture, Manifest
from lamella.similarity.alignment.sources import read_source
from lamella.similarity.alignment.table import table_of, write_alignment
from lamella.similarity.pairs import Name, Pair

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
    manifests = [{**asdict(one), "shards": None, "complete": None, "whole_text": None} for one in captures]
    told = json.dumps([version("lamella"), manifests, dict(settings), dtype, tile.pairs], sort_keys=True, default=repr)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


Load = Callable[[str, str], nn.Module]  # name or path, dtype


@dataclass(frozen=True)
class Work:
    """What a process must know to compute any tile of a sweep: everything by name, nothing that is large.

    Attributes:
        model: what ``load`` takes: a hub id or path, unless another loader is given.
        dtype: to load it in.
        device: to compute on.
        captures: folders of the capture, and of the one to score on where there is one.
        manifests: of these captures.
        settings: of ``align``, all of them.
        folder: of the results.
        align: as `lamella.similarity.alignment.align`.
        load: from name and dtype to the model.
    """

    model: str
    dtype: str
    device: str
    captures: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    settings: Mapping[str, Any]
    folder: Path
    align: Callable[..., Any]
    load: Load = load_pretrained

    def path(self, tile: Tile) -> Path:
        """Where the tile's result is, or will be."""
        return self.folder / f"{tile_key(tile, self.manifests, self.settings, self.dtype)}.parquet"

    def open(self) -> Opened:
        """The model and the captures.

        Raises:
            LamellaError: the model is not the one that was captured, or a capture has changed.
        """
        captures = tuple(Capture.load(folder) for folder in self.captures)
        for capture, manifest in zip(captures, self.manifests, strict=True):
            if capture.manifest != manifest:
                raise LamellaError(
                    f"The capture in {capture.folder} is not the one that this sweep began with: it was taken further "
                    "or replaced since, or the worker sees another folder under this path. Start the sweep again."
                )
        model = self.load(self.model, self.dtype).to(self.device)
        for capture in captures:
            capture.check(model)
        return Opened(model, captures)


@dataclass(frozen=True)
class Opened:
    """What a process keeps from tile to tile."""

    model: nn.Module
    captures: tuple[Capture, ...]

    def compute(self, work: Work, tile: Tile) -> None:
        """Aligns the pairs of a tile and writes the result atomically."""
        settings = dict(work.settings)
        if len(self.captures) > 1:
            settings["score_on"] = self.captures[1]
        with _one_thread():
            if (notes := self._unusable(tile, settings)) is None:
                frame = work.align(self.captures[0], self.model, pairs=tile.pairs, **settings)
            else:
                frame = table_of([])
                frame.attrs["notes"] = notes
        write_alignment(frame, work.path(tile))

    def _unusable(self, tile: Tile, settings: Mapping[str, Any]) -> list[str] | None:
        """Why no source of a tile can be aligned, which is not an error while others can; None where one can be."""
        layers = {layer.index: layer for layer in moe_layers(self.model)}
        given = (settings["held_out"], settings.get("score_on"), settings["seed"])
        notes = []
        for layer, index in tile.sources:
            read = read_source(self.captures[0], (layer, index), layers[layer].experts[index], *given)
            if not isinstance(read, str):
                return None
            notes.append(read)
        return notes


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums have the same order in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
