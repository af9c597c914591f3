"""The state of a capture on disk: every checkpoint is written atomically."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lamella.errors import LamellaError
from lamella.files import atomic
from lamella.similarity.activations.manifest import NAME, Manifest
from lamella.similarity.activations.reading import Capture
from lamella.similarity.activations.reservoir import COUNTS, Reservoir

Reservoirs = Mapping[int, Reservoir]
SECONDS = 60.0  # between two checkpoints, at least
_SHARE = 20  # and at least so many times what writing one takes
_CHECKPOINT = "checkpoint-"


class Saver:
    """Writes the state of one capture from time to time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = time.monotonic()
        self._took = 0.0

    def resume(self, asked: Manifest) -> tuple[Manifest, Reservoirs]:
        """The latest checkpoint in the folder, or an empty start; of a finished capture only its manifest.

        Raises:
            LamellaError: what lies there is a capture of something else, or broken.
        """
        reservoirs = {
            layer: Reservoir.empty(experts, asked.per_expert, asked.hidden_size, asked.torch_dtype)
            for layer, experts in asked.layers
        }
        if not (self._folder / NAME).exists():
            return asked, reservoirs
        done = Manifest.read(self._folder)
        done.check_same(asked, self._folder)
        Capture.load(self._folder)  # complains about what is missing
        with self._telling():
            self._clear(done)
        for layer, reservoir in reservoirs.items() if not done.complete else ():
            reservoir.unpack(load_file(done.shard(self._folder, layer)))
        return done, reservoirs

    def checkpoint(self, manifest: Manifest, reservoirs: Reservoirs) -> None:
        """Writes the state if the last time is long enough ago."""
        if time.monotonic() - self._last < max(SECONDS, _SHARE * self._took):
            return
        started = time.monotonic()
        manifest = replace(manifest, shards=f"{_CHECKPOINT}{manifest.rows_done:012d}")
        with self._telling(), atomic(self._folder / manifest.shards) as unfinished:
            unfinished.mkdir()
            for layer, reservoir in reservoirs.items():
                save_file(reservoir.packed(), unfinished / manifest.shard(Path(), layer).name)
        self._state(manifest)
        self._last = time.monotonic()
        self._took = self._last - started

    def finish(self, manifest: Manifest, reservoirs: Reservoirs) -> Capture:
        """Writes the shards to their last place, and a manifest that says that all is there."""
        manifest = replace(manifest, complete=True, shards=".")
        counts = {}
        with self._telling():
            for layer, reservoir in reservoirs.items():
                packed = reservoir.packed()
                counts[layer] = {name: packed[name] for name in COUNTS}
                with atomic(manifest.shard(self._folder, layer)) as unfinished:
                    save_file(packed, unfinished)
        self._state(manifest)
        return Capture(self._folder, manifest, counts)

    def _state(self, manifest: Manifest) -> None:
        """From here on the new state counts, and what is left of older and unfinished ones goes."""
        with self._telling():
            manifest.write(self._folder)
            self._clear(manifest)

    def _clear(self, manifest: Manifest) -> None:
        for left in self._folder.iterdir():
            if left.name.startswith((_CHECKPOINT, ".writing-")) and left.name != manifest.shards:
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise LamellaError(
                f"The capture could not be written to {self._folder}: {error}. What was written before is intact: "
                "make room, and capture again into the same folder; it goes on from there."
            ) from error
