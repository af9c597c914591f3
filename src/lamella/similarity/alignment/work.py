"""The work on one tile, the same in this process as in another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from lamella.similarity.alignment.tiles import Tile, tile_key

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
        """Aligns the pairs of a tile and writes the result, whole or not at all."""
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
        """Why no source of a tile can be aligned, which is no error while others can; None where one can be."""
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
