"""Tiles on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lamella.cluster import Cluster, connected
from lamella.errors import LamellaError
from lamella.similarity.alignment.tiles import Opened, Tile, Work

# what this worker has opened; a worker stays for many tiles
_opened: dict[tuple[Any, ...], Opened] = {}


def compute_on_ray(work: Work, tiles: Sequence[Tile], address: str, finished: Callable[[], None]) -> None:
    """Computes every tile on a cluster whose workers see the same files under the same paths.

    A tile whose worker dies is given to another one, so it may be computed more than once; its result takes its place
    on disk as a whole, so it is there once.

    Args:
        work: what the workers must know.
        tiles: those to compute.
        address: "auto" for the cluster that runs on this machine, or one's own; "local" starts one that ends with
            this call.
        finished: called after each tile.

    Raises:
        LamellaError: Ray is not installed, no cluster is found, workers die again and again or write elsewhere; also
            whatever the work on a tile raises.
    """
    with connected(address) as ray:
        cluster: Cluster[Tile] = Cluster(ray, _compute, "tile", gpus=int(work.device != "cpu"))
        shared = cluster.share(work)
        for tile in tiles:
            cluster.submit(tile, shared, tile)
        try:
            while cluster.waiting:
                _check_written(cluster.next(), work)
                finished()
        finally:
            cluster.cancel()


def _compute(work: Work, tile: Tile) -> None:
    if work.path(tile).is_file():  # an earlier try wrote it and died before it could say so
        return
    key = (work.model, work.dtype, work.device, work.captures, work.manifests)
    if key not in _opened:
        _opened.clear()
        _opened[key] = work.open()
    _opened[key].compute(work, tile)


def _check_written(tile: Tile, work: Work) -> None:
    if not work.path(tile).is_file():
        raise LamellaError(
            f"A worker finished a tile ({tile}), but {work.path(tile)} is not there. Workers must see the folders "
            "of model, capture and results under the same paths: use a shared file system."
        )
