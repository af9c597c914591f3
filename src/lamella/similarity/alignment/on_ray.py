"""Tiles on the workers of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lamella.errors import LamellaError
from lamella.similarity.alignment.tiles import Opened, Tile, Work

RETRIES = 3  # of a tile whose worker died

# what this worker has opened; a worker stays for many tiles
_opened: dict[tuple[Any, ...], Opened] = {}


def compute_on_ray(work: Work, tiles: Sequence[Tile], address: str, finished: Callable[[], None]) -> None:
    """Computes every tile on a cluster whose workers see the same files under the same paths.

    A tile whose worker dies is given to another one, up to `RETRIES` times, so it may be computed more than once; its
    result takes its place on disk as a whole, so it is there once.

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
    with _connected(address) as ray:
        compute = ray.remote(num_cpus=1, num_gpus=int(work.device != "cpu"), max_retries=RETRIES)(_compute)
        shared = ray.put(work)
        waiting = {compute.remote(shared, tile): tile for tile in tiles}
        try:
            while waiting:
                for done in ray.wait(list(waiting))[0]:
                    _check(ray, done, waiting[done], work)
                    del waiting[done]
                    finished()
        finally:
            for left in waiting:
                ray.cancel(left, force=True)


def _compute(work: Work, tile: Tile) -> None:
    if work.path(tile).is_file():  # an earlier try wrote it and died before it could say so
        return
    key = (work.model, work.dtype, work.device, work.captures, work.manifests)
    if key not in _opened:
        _opened.clear()
        _opened[key] = work.open()
    _opened[key].compute(work, tile)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that was there before is used and left as it is."""
    try:
        import ray
    except ImportError as error:
        raise LamellaError("A sweep on a cluster needs Ray: `pip install lamella[ray]`.") from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, include_dashboard=False if address == "local" else None, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise LamellaError(
            f"No Ray cluster answers at {address!r}: {error} Start one with `ray start --head`, name its address, or "
            "leave --ray out to compute here."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check(ray: Any, done: Any, tile: Tile, work: Work) -> None:
    """Raises what went wrong with a tile."""
    try:
        ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LamellaError):
            raise error.cause from error
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise LamellaError(
            f"{RETRIES + 1} workers died over one tile ({tile}), often for want of memory: {error} Finished tiles "
            "are kept: run it again with smaller tiles or fewer workers on a machine."
        ) from error
    if not work.path(tile).is_file():
        raise LamellaError(
            f"A worker finished a tile ({tile}), but {work.path(tile)} is not there. Workers must see the folders "
            "of model, capture and results under the same paths: use a shared file system."
        )
